"""`generate` with a streaming model: a video that is written chunk by chunk, and can be gone on with."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vstar_engine.artifacts.files import check_writable, sha256
from vstar_engine.config.models import Spec
from vstar_engine.config.request import Clip, Request
from vstar_engine.config.streamed import ENDLESS, StreamedRequest
from vstar_engine.engine import Engine
from vstar_engine.fragments import FragmentedFile, Written
from vstar_engine.loading import check_machine, load_model
from vstar_engine.model_choice import ModelChoice
from vstar_engine.prompting.interpolation import spread_at
from vstar_engine.prompting.synopsis import Synopsis
from vstar_engine.streaming import Stream, StreamState
from vstar_engine.video_input import last_frames

from .video_options import clip_of

# ends the name of the file beside a video that says how to go on with it
STATE = ".resume"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that a streaming model alone takes."""
    group = parser.add_argument_group("streaming models")
    group.add_argument("--start", type=Path, metavar="VIDEO", help="video whose last frames are the first chunk")
    group.add_argument("--first-model", metavar="NAME", help="model that makes the first chunk where there is no --start")
    group.add_argument("--first-weights", metavar="DIR", help="its weights; not needed for mini")


def given(args: argparse.Namespace) -> list[str]:
    """Returns those of these options that were given."""
    names = ("start", "first_model", "first_weights")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def clip_and_length(args: argparse.Namespace, spec: Spec) -> tuple[Clip, float]:
    """Returns the settings with the size filled in, and the number of frames, ENDLESS for no end."""
    length, args.frames = args.frames, spec.streaming.chunk if spec.streaming else args.frames
    try:
        return clip_of(args).fitted(spec), length
    finally:
        args.frames = length


def streamed(clip: Clip, synopsis: Synopsis, length: float) -> StreamedRequest:
    """Returns the request of a synopsis; of an endless video the timeline ends at its last state's frame.

    Raises ValueError where states of an endless video have no frames of their own.
    """
    values: dict[str, Any] = {one.name: getattr(clip, one.name) for one in fields(Clip)}
    if not clip.at and not clip.durations:
        values |= {"at": synopsis.at, "durations": synopsis.durations}
    if not clip.negatives:
        values["negative"], values["negatives"] = synopsis.unwanted(clip.negative)
    values["frames"] = length
    if length == ENDLESS:
        at = values["at"]
        if len(synopsis.states) > 1 and not (at and all(isinstance(place, int) for place in at)):
            raise ValueError("a video without end has one state, or states at frames (--at 0 80 160), the last of which stays")
        values["frames"] = 1 + (at[-1] if at else 0)
    return StreamedRequest(synopsis.states, **values, endless=length == ENDLESS)


def first_chunk(args: argparse.Namespace, choice: ModelChoice, request: StreamedRequest) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the first chunk, (T, H, W, 3) uint8 in the request's size, and what made it."""
    assert choice.spec.streaming is not None
    assert request.size is not None
    frames = choice.spec.streaming.chunk
    if args.start is not None:
        read, count = last_frames(args.start, request.size, frames)
        return read, {"file": args.start.name, "sha256": sha256(args.start), "frames": count}
    first = first_choice(args, choice)
    engine = Engine(load_model(first, *check_machine(first)))
    values = {one.name: getattr(request, one.name) for one in fields(Request)}
    plain = {"states": request.states[:1], "at": (), "durations": (), "negatives": request.negatives[:1], "frames": frames}
    batch = engine.begin([Request(**{**values, **plain})])
    row = batch.rows[0]
    if len(request.states) > 1:  # its text is its frames' own part of the timeline
        where = [min(frame, request.frames - 1) for frame in range(frames)]
        texts = [anchors.float() for anchors in engine.encoded(request, None)]
        spreads = [spread_at(one, request.anchors, where, request.mode)[None].to(engine.dtype) for one in texts if len(one) > 1]
        row.context = spreads[0]
        if len(spreads) > 1:
            row.uncond_context = spreads[1]
    for _ in tqdm(range(batch.steps), desc="first chunk", unit="step", file=sys.stderr, disable=None):
        batch.step()
    made = engine.finish(batch, row)
    return made.frames, {name: made.provenance[name] for name in ("model", "weights", "device", "dtype")}


def first_choice(args: argparse.Namespace, choice: ModelChoice) -> ModelChoice:
    """Returns the model of the first chunk; ValueError for none, and for one that itself needs a first chunk."""
    if args.first_model is None:
        raise ValueError(
            f"model {choice.model} goes on from {choice.spec.streaming and choice.spec.streaming.chunk} frames: give "
            "--start VIDEO, or a model that makes them: --first-model NAME [--first-weights DIR]"
        )
    first = ModelChoice(args.first_model, args.first_weights, device=choice.device, dtype=choice.dtype)
    if first.spec.streaming is not None:
        raise ValueError(f"--first-model {args.first_model} needs a first chunk itself; give a text-to-video model")
    return first


def check(args: argparse.Namespace, choice: ModelChoice, clip: Clip) -> Path:
    """Returns the file to write; raises for settings that make no sense, before anything is loaded."""
    out = Path(args.out)
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"a video in chunks is written as an mp4, got {out.name!r}")
    beside = [f"--{name}" for name in ("gif", "sheet", "embeddings", "plan") if getattr(args, name)]
    if beside:
        raise ValueError(f"a streaming model takes no {', '.join(beside)}")
    if args.start is not None and args.first_model is not None:
        raise ValueError("give --start or --first-model, not both")
    if not args.resume:
        check_writable(out, args.force)
    assert clip.size is not None
    if args.start is None and not args.resume:
        first_choice(args, choice).spec.check_size(*clip.size)
    return out


def run(args: argparse.Namespace, choice: ModelChoice, found: list[Synopsis], clip: Clip, length: float) -> int:
    """Makes the video of one synopsis. Ctrl-C ends a video without end; another one can be gone on with by --resume."""
    out = check(args, choice, clip)
    if len(found) != 1:
        raise ValueError(f"a streaming model makes one video at a time, got {len(found)} synopses")
    request = streamed(clip, found[0], length)
    request.fitted(choice.spec)
    state_file = out.with_name(out.name + STATE)
    state, about = StreamState.read(state_file) if args.resume else (None, {})
    start = None
    if state is None:
        start, about["first_chunk"] = first_chunk(args, choice, request)
    stream = Stream(Engine(load_model(choice, *check_machine(choice))), request, start, state, about=about["first_chunk"])
    if about.setdefault("identity", stream.identity()) != stream.identity():
        raise ValueError(f"{state_file} is of a video of other settings or weights; give those, or leave out --resume")
    file = FragmentedFile(out, Written(**about["written"]) if state is not None else None)
    try:
        _write(stream, file, state_file, about)
    except KeyboardInterrupt:
        if not request.endless:
            raise
    state_file.unlink(missing_ok=True)
    _report(stream, file, args.json)
    return 0


def _write(stream: Stream, file: FragmentedFile, state_file: Path, about: dict[str, Any]) -> None:
    """Writes the chunks, each a fragment, and behind each the state that it can be gone on from."""
    total = None if stream.request.endless else stream.request.chunks(stream.engine.spec)
    with tqdm(total=total, initial=stream.state.done, desc="chunks", unit="chunk", file=sys.stderr, disable=None) as bar:

        def on_step(chunk: int, done: int, steps: int) -> None:
            bar.set_postfix_str(f"step {done}/{steps}")

        for part in stream.run(on_step):
            written = file.append(part)
            stream.state.save(state_file, {**about, "written": vars(written)})
            bar.update()


def _report(stream: Stream, file: FragmentedFile, as_json: bool) -> None:
    written = file.written
    assert stream.request.size is not None
    if as_json:
        print(json.dumps({"files": [str(file.path)], "frames": written.frames, **stream.provenance}, default=str))
        return
    height, width = stream.request.size
    print(f"wrote {file.path}: {written.frames} frames of {height}x{width} in {written.fragments} chunks")
