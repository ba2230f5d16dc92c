"""Trains the mini model from nothing: `python -m tools.mini.train OUT`. Run again after a stop, it goes on where it was.

OUT gets the rendered clips (2.4 GB), checkpoints, logs as JSON lines, and at the end what the project carries copies of:
`OUT/mini` (vstar_engine/data/mini), the probe that judges videos and its accuracy (beside `training/probe.py`).
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tools.mini.data.clips import rendered
from tools.mini.training import probe, text_tower, unet, vae
from tools.mini.training.loop import Run
from tools.mini.training.pack import pack
from vstar_engine.config.models import model_named

CLIPS = 4000


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.train", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips to render and train on (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all step counts (default %(default)s)")
    args = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    run, seeds = Run(model_named("mini"), args.out, args.scale), range(args.clips)
    clips = rendered(args.out, seeds)
    text = text_tower.train(run, seeds)
    autoencoder = vae.train(run, clips)
    tokens, _ = text_tower.kept_captions(args.out, seeds)
    denoiser = unet.train(run, unet.encoded(args.out, autoencoder, clips), tokens, text)
    autoencoder = vae.refine(run, clips, autoencoder)
    pack(run.spec, denoiser, autoencoder, text, args.out / "mini")
    reader = probe.train(run, clips, autoencoder)
    probe.save(reader, args.out / "probe.safetensors")
    held_out, truths = rendered(args.out, probe.HELD_OUT), probe.labelled(probe.HELD_OUT)
    right = {
        "rendered": probe.accuracy(reader, held_out, truths),
        "decoded": probe.accuracy(reader, held_out, truths, autoencoder),
    }
    (args.out / "probe.json").write_text(json.dumps(right, indent=1) + "\n")


if __name__ == "__main__":
    main()
