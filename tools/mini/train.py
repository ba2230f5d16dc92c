"""Trains the mini model from nothing: `python -m tools.mini.train OUT`. Run again after a stop, it goes on where it was.

OUT gets the rendered clips (2.4 GB), checkpoints, logs as JSON lines, and at the end what the project carries copies of:
`OUT/mini` (vstar_engine/data/mini), the probe that judges videos and its accuracy (beside this file).
"""

import argparse
import json
import logging
from pathlib import Path

from vstar_engine.config.models import model_named

from . import probe, train_text, train_unet, train_vae
from .clips import rendered
from .loop import Run
from .pack import pack

CLIPS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.train", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips to render and train on (default %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all step counts (default %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    run, seeds = Run(model_named("mini"), args.out, args.scale), range(args.clips)
    clips = rendered(args.out, seeds)
    text = train_text.train(run, seeds)
    vae = train_vae.train(run, clips)
    tokens, _ = train_text.kept_captions(args.out, seeds)
    unet = train_unet.train(run, train_unet.encoded(args.out, vae, clips), tokens, text)
    vae = train_vae.refine(run, clips, vae)
    pack(run.spec, unet, vae, text, args.out / "mini")
    reader = probe.train(run, clips, vae)
    probe.save(reader, args.out / "probe.safetensors")
    held_out, truths = rendered(args.out, probe.HELD_OUT), probe.labelled(probe.HELD_OUT)
    right = {"rendered": probe.accuracy(reader, held_out, truths), "decoded": probe.accuracy(reader, held_out, truths, vae)}
    (args.out / "probe.json").write_text(json.dumps(right, indent=1) + "\n")


if __name__ == "__main__":
    main()
