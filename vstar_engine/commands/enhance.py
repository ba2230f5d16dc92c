"""The `enhance` command: a video of any length at another size, with detail by a text-to-video model."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from vstar_engine.artifacts.files import check_writable, sha256
from vstar_engine.config.request import Clip
from vstar_engine.config.streamed import StreamedRequest
from vstar_engine.config.video_fields import VIDEO_FIELDS, clip_from
from vstar_engine.engine import Engine
from vstar_engine.enhancing import Enhancement, enhance
from vstar_engine.loading import check_machine, load_model
from vstar_engine.video import Video, encoding
from vstar_engine.video_input import whole_video

from .model_options import add_model_options, choice_from
from .video_options import add_video_options, value_of

# settings of a video that are those of the one that is enhanced, or have no place here
TAKEN = ("negative", "size", "seed", "sampling.steps", "sampling.guidance", "sampling.eta", "sampling.fps_condition")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `enhance`."""
    parser.add_argument("video", type=Path, help="video to enhance")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what it shows")
    add_video_options(parser, TAKEN)
    for name, said in (("window", "frames the model sees at once"), ("overlap", "frames that windows share")):
        parser.add_argument(f"--{name}", type=int, default=getattr(Enhancement, name), help=f"{said} (default %(default)s)")
    said = "share of the steps that are taken: more changes more (default %(default)s)"
    parser.add_argument("--strength", type=float, default=Enhancement.strength, help=said)
    add_model_options(parser)
    parser.add_argument("--out", default=Path("enhanced.mp4"), type=Path, help="mp4 to write (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.set_defaults(fast=None)


def clip_of(args: argparse.Namespace) -> Clip:
    """Returns the settings that options give."""
    rows = [row for row in VIDEO_FIELDS if row.path in TAKEN]
    values = {row.path: value_of(row, args) for row in rows}
    return clip_from({path: value for path, value in values.items() if value is not None} | {"tar": None})


def run(args: argparse.Namespace) -> int:
    """Runs `enhance`. Settings are checked before the model is loaded."""
    how, choice, clip = Enhancement(args.window, args.overlap, args.strength), choice_from(args), clip_of(args)
    clip = clip.fitted(choice.spec)
    if args.out.suffix.lower() != ".mp4":
        raise ValueError(f"an enhanced video is written as an mp4, got {args.out.name!r}")
    if choice.spec.streaming is not None or choice.engine is not None:
        raise ValueError(
            "a video is enhanced by a text-to-video model in eager PyTorch: leave out --engine, take another --model"
        )
    check_writable(args.out, args.force)
    frames, fps = whole_video(args.video)
    values = {one.name: getattr(clip, one.name) for one in fields(Clip)} | {"frames": len(frames), "fps": fps}
    request = StreamedRequest((args.prompt,), **values)
    engine = Engine(load_model(choice, *check_machine(choice)))
    source = {"video": args.video.name, "sha256": sha256(args.video)}
    steps = how.steps(request.sampling.steps)
    with tqdm(total=steps, desc="enhance", unit="step", file=sys.stderr, disable=None) as bar, encoding(args.out) as along:

        def step(done: int, total: int) -> None:
            bar.update()

        def write(part: Video) -> None:
            along(Video(part.frames, part.fps, {**part.provenance, "source": source}))

        made = enhance(engine, frames, request, how, step, write)
    count, height, width, _ = made.frames.shape
    print(f"wrote {args.out}: {count} frames of {height}x{width}")
    return 0
