"""The `generate` command: makes a request of its options, and files of the request."""

import argparse
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from vstar_engine.artifacts.files import check_writable
from vstar_engine.config.request import Clip, Request
from vstar_engine.config.streamed import ENDLESS
from vstar_engine.config.windows import FIFO, MAX_FRAMES
from vstar_engine.engine import Engine
from vstar_engine.loading import check_machine, load_model
from vstar_engine.machine import memory
from vstar_engine.model_choice import ModelChoice
from vstar_engine.prompting.embeddings import Embeddings
from vstar_engine.prompting.synopsis import GIVEN, PROMPT, Synopsis, read_synopses
from vstar_engine.sampling.saved_state import EVERY, Checkpoint
from vstar_engine.video import Video, check_ending, encoding

from . import frame_plan, stream
from .model_options import add_model_options, choice_from
from .option_sources import add_config_options
from .prompt_options import add_llm_options, printable, synopses
from .video_options import add_video_options, clip_of, settle
from .weights_options import with_weights

# the ending of a checkpoint's name, behind that of its video
CHECKPOINT = ".checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate`."""
    parser.add_argument("prompt", nargs="?", help="what the video shows; it is turned into states")
    parser.add_argument(
        "--synopsis", metavar="FILE", help="file of states: JSON, or one state a line; a JSON list makes several videos"
    )
    parser.add_argument("--embeddings", metavar="FILE", help="file of `embed` with encoded states; no text tower is loaded")
    add_video_options(parser)
    parser.add_argument("--plan", action="store_true", help="print the weight of each state in each frame, and stop")
    add_model_options(parser)
    parser.add_argument("--out", default="vstar.mp4", help="mp4 or gif file (default %(default)s); several get numbers")
    parser.add_argument("--gif", action="store_true", help="write a gif beside the mp4")
    parser.add_argument("--sheet", action="store_true", help="write a contact sheet of every 8th frame (png) beside it")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help=f"write OUT{CHECKPOINT} after so many steps (default {EVERY} for clips in windows, else never); 0: never",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"continue from OUT{CHECKPOINT} (a streaming model: OUT{stream.STATE}), with the same options",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    stream.add_options(parser)
    add_llm_options(parser)
    add_config_options(parser)
    parser.set_defaults(settle=settle)


def given_synopses(args: argparse.Namespace, bundle: Embeddings | None) -> list[Synopsis]:
    """Returns the synopses that options give; none for a prompt, whose synopsis `described` makes."""
    given = [name for name in ("prompt", "states", "synopsis") if getattr(args, name) is not None]
    if bundle is not None:
        if given or args.negative or args.negatives:
            raise ValueError("--embeddings brings states and negative prompts with it; leave out PROMPT, --states and the like")
        return [bundle.synopsis]
    if len(given) != 1:
        raise ValueError(f"give exactly one of PROMPT, --states and --synopsis, got {', '.join(given) or 'none'}")
    if args.synopsis is not None:
        return read_synopses(args.synopsis)
    return [] if args.states is None else [Synopsis(args.states[0], tuple(args.states))]


def state_count(args: argparse.Namespace) -> int | None:
    """Returns how many states a prompt becomes: --state-count, or one for each place, duration or negative; None: open."""
    if args.no_synopsis:
        return 1
    if args.state_count is not None:
        return args.state_count
    return len(args.at or args.durations or args.negatives or ()) or None


def described(args: argparse.Namespace, given: list[Synopsis]) -> list[Synopsis]:
    """Returns the given synopses, or the synopsis of the prompt."""
    endless = args.frames == ENDLESS
    count = state_count(args) or (1 if endless else None)
    return given or list(synopses(args, [args.prompt], count, MAX_FRAMES if endless else args.frames))


def check_states(args: argparse.Namespace, clip: Clip, given: list[Synopsis]) -> None:
    """Raises ValueError when a clip cannot show the given states, or the number of states a prompt becomes."""
    for synopsis in given:
        clip.showing(synopsis)
    if not given and (count := state_count(args)) is not None:
        clip.places(count)


def settled(clip: Clip, choice: ModelChoice, bundle: Embeddings | None) -> Clip:
    """Returns a clip with the size of its model or built engine, and the negative prompt of its embeddings."""
    if clip.size is None and choice.engine is not None and choice.engine.identity["size"]:
        clip = replace(clip, size=tuple(choice.engine.identity["size"]))
    return clip.fitted(choice.spec) if bundle is None else replace(clip.fitted(choice.spec), negative=bundle.negative_prompt)


def outputs(args: argparse.Namespace, count: int) -> list[list[Path]]:
    """Returns the files of each video; raises unless each can be written."""
    out = Path(args.out)
    check_ending(out)
    named = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:03d}") for i in range(1, count + 1)]
    beside = [ending for ending, asked in ((".gif", args.gif), (".png", args.sheet)) if asked and out.suffix.lower() != ending]
    files = [[path, *map(path.with_suffix, beside)] for path in named]
    for path in (path for group in files for path in group):
        check_writable(path, args.force)
    return files


def checkpoint_of(args: argparse.Namespace, clip: Clip, path: Path) -> Checkpoint | None:
    """Returns where and how often a video's checkpoint is written; None for never."""
    every = args.checkpoint_every
    if every is None:
        long = clip.plan is not None and clip.blend != FIFO
        every = EVERY if long or args.resume else 0
    if every == 0 and args.resume:
        raise ValueError("--resume continues from a checkpoint, and --checkpoint-every 0 writes none; leave one of them out")
    return Checkpoint(path.with_name(path.name + CHECKPOINT), every, args.resume) if every else None


def run(args: argparse.Namespace) -> int:
    """Runs `generate`. Settings are checked before a language model is asked and before weights are read."""
    bundle = None if args.embeddings is None else Embeddings.read(args.embeddings)
    choice = choice_from(args, ModelChoice.text if bundle is None else None)
    given = given_synopses(args, bundle)
    if choice.spec.streaming is not None:
        clip, length = stream.clip_and_length(args, choice.spec)
        stream.check(args, choice, clip)
        return stream.run(args, with_weights(choice, args.yes), described(args, given), clip, length)
    if only := stream.given(args):
        raise ValueError(f"{', '.join(only)} is for a streaming model, and {choice.model} is none")
    if args.frames == ENDLESS:
        raise ValueError(f"--frames inf is for a streaming model, and {choice.model} is none")
    clip = settled(clip_of(args), choice, bundle)
    check_states(args, clip, given)
    if args.plan:
        for synopsis in described(args, given):
            request = clip.showing(synopsis)
            print(json.dumps(frame_plan.as_json(request)) if args.json else printable(frame_plan.as_text(request)))
        return 0
    files = outputs(args, len(given) or 1)
    checkpoints = [checkpoint_of(args, clip, paths[0]) for paths in files]
    for begun in filter(None, checkpoints):
        begun.check()
    if clip.plan is not None and not args.json:
        print(clip.plan.described, flush=True)
    device, dtype = check_machine(choice)
    choice = with_weights(choice, args.yes)
    clip = clip.fitted(choice.spec)
    if choice.engine is not None:
        choice.engine.check_requests(clip)
    memory.check(memory.Footprint.of(clip, choice.spec, dtype, text=bundle is None), device, loaded=False)
    found = described(args, given)
    requests = [clip.showing(synopsis) for synopsis in found]
    engine = Engine(load_model(choice, device, dtype))
    if engine.records:
        assert clip.size is not None
        engine.warm([(clip.pass_frames, *clip.size)], clip.sampling)
    for synopsis, request, paths, checkpoint in zip(found, requests, files, checkpoints, strict=True):
        if args.prompt is not None and not args.json:
            print(printable("\n  ".join([f"synopsis_source: {synopsis.source}", *synopsis.states])), flush=True)
        about = {} if synopsis.source in (GIVEN, PROMPT) else {"prompt": synopsis.prompt, "synopsis_source": synopsis.source}
        video = _made(engine, request, bundle, paths, about, checkpoint)
        if checkpoint is not None:
            checkpoint.path.unlink(missing_ok=True)
        _report(video, paths, args.json)
    return 0


def _made(
    engine: Engine,
    request: Request,
    bundle: Embeddings | None,
    paths: list[Path],
    about: dict[str, str],
    checkpoint: Checkpoint | None,
) -> Video:
    """Makes a video and its files, with `about` in the provenance; encodes an mp4 while the video is decoded."""

    def with_about(video: Video) -> Video:
        return replace(video, provenance={**video.provenance, **about})

    first, beside = paths[0], paths[1:]
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=request.sampling.steps, desc="denoise", unit="step", file=sys.stderr, disable=None)
        )
        along = stack.enter_context(encoding(first)) if first.suffix.lower() == ".mp4" else None

        def step(done: int, total: int) -> None:
            bar.update(done - bar.n)

        def window(done: int, total: int) -> None:
            bar.set_postfix_str(f"window {done}/{total}")

        def write(part: Video) -> None:
            if along:
                along(with_about(part))

        video = with_about(engine.run(request, step, bundle, write, checkpoint, window))
    for path in beside if along else paths:
        video.save(path)
    return video


def _report(video: Video, paths: list[Path], as_json: bool) -> None:
    frames, height, width, _ = video.frames.shape
    if as_json:
        seconds = {stage: round(value, 3) for stage, value in video.seconds.items()}
        print(json.dumps({"files": [str(path) for path in paths], "seconds": seconds, **video.provenance}))
        return
    stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in video.seconds.items())
    print(f"wrote {', '.join(map(str, paths))}: {frames} frames of {height}x{width}\n{stages}")
