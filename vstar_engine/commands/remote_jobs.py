"""The commands `submit`, `status`, `fetch` and `cancel`, for jobs of a `vstar-engine serve`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vstar_engine.artifacts.files import check_writable
from vstar_engine.artifacts.text_file import read_text, unreadable
from vstar_engine.config.timeline import parse_position
from vstar_engine.prompting.synopsis import GIVEN, Synopsis, read_synopses

from .option_sources import add_config_options
from .prompt_options import printable
from .video_options import add_http_options, http_from

if TYPE_CHECKING:
    from vstar_engine.client import Client, RemoteVideo

LISTED = 20


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the server and its key; a key on the command line could be read by other users."""
    parser.add_argument(
        "--server", metavar="URL", help="address of the server (default: $VSTAR_SERVER, else http://127.0.0.1:8000)"
    )
    parser.add_argument("--key-file", type=Path, help="file whose first line is the API key (default: $VSTAR_API_KEY)")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="seconds to retry while the server is busy or restarting (default %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")
    add_config_options(parser)


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `submit`; the server fills in those left out."""
    parser.add_argument("prompt", nargs="?", help="what the video shows; the server turns it into states")
    parser.add_argument(
        "--synopsis", metavar="FILE", help="file of states: JSON, or one state a line; a JSON list makes several videos"
    )
    parser.add_argument("--embeddings", metavar="ID", help="id of encoded states on the server")
    parser.add_argument("--model", help="the model, where a server offers several")
    add_http_options(parser)
    parser.add_argument("--no-synopsis", action="store_true", help="use the prompt as the only state")
    parser.add_argument("--priority", type=int, help="jobs of higher priority run earlier")
    parser.add_argument(
        "--metadata", action="extend", nargs="+", metavar="NAME=TEXT", help="text stored with the job; repeatable"
    )
    parser.add_argument("--wait", action="store_true", help="wait until the job has ended; it goes on if you interrupt")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="wait, and write the mp4 to this file; several files are numbered"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    add_server_options(parser)


def add_status_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="*", help=f"jobs (default: the newest {LISTED})")
    add_server_options(parser)


def add_fetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="the job")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: the id, with the ending of what is fetched")
    parser.add_argument("--variant", default="video", help="video, thumbnail or spritesheet (default %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    add_server_options(parser)


def add_cancel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="+", help="jobs")
    add_server_options(parser)


def client_of(args: argparse.Namespace) -> "Client":
    """Returns a client of the server that options name; ValueError for a key file without a key."""
    from vstar_engine.client import Client

    key = None
    if args.key_file is not None:
        try:
            key = read_text(args.key_file).split("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the key in {args.key_file}: {unreadable(error)}") from error
        if not key:
            raise ValueError(f"the first line of {args.key_file} holds no key")
    return Client(args.server, key, args.patience)


def bodies(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the request body of each video."""
    given = [name for name in ("prompt", "states", "synopsis", "embeddings") if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of PROMPT, --states, --synopsis and --embeddings, got {', '.join(given) or 'none'}")
    common = settings_of(args)
    if args.synopsis is not None:
        return [{**common, **timeline(synopsis)} for synopsis in read_synopses(args.synopsis)]
    if args.states is not None:
        at = tuple(parse_position(text) for text in args.at or ())
        apart = tuple(args.durations or ()), tuple(args.negatives or ())
        return [{**common, **timeline(Synopsis(args.states[0], tuple(args.states), GIVEN, at, *apart))}]
    if args.at or args.durations or args.negatives:
        raise ValueError("--at, --durations and --negatives describe given states; give --states too")
    return [{**common, "embeddings": args.embeddings} if args.prompt is None else {**common, "prompt": args.prompt}]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of a body that options set."""
    fields = {
        "model": args.model,
        "enhance_prompt": False if args.no_synopsis else None,
        "priority": args.priority,
        "metadata": metadata_of(args.metadata) if args.metadata else None,
    }
    return http_from(args) | {name: value for name, value in fields.items() if value is not None}


def metadata_of(words: list[str]) -> dict[str, str]:
    """Reads NAME=TEXT."""
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ValueError(f"metadata is NAME=TEXT, got {name!r}")
    return {name: text for name, _, text in pairs}


def timeline(synopsis: Synopsis) -> dict[str, Any]:
    """Returns the fields of a body that hold a synopsis; ValueError when only some states have a place or negative prompt."""
    for name in ("at", "negatives"):
        if len(getattr(synopsis, name)) not in (0, len(synopsis.states)):
            raise ValueError(
                f"there are {len(getattr(synopsis, name))} {name} for {len(synopsis.states)} states; give one for each"
            )
    if len(synopsis.durations) not in (0, len(synopsis.states) - 1, len(synopsis.states)):
        raise ValueError(f"there are {len(synopsis.durations)} durations for {len(synopsis.states)} states; give one for each")
    entry = synopsis.entry()
    return {"prompt": entry["prompt"], "synopsis": entry["subprompts"]}


def run_submit(args: argparse.Namespace) -> int:
    """Submits; with --wait or --out, waits and fetches."""
    wanted = bodies(args)
    paths = named(args.out, len(wanted))
    for path in paths:
        if path is not None:
            check_writable(path, args.force)
    with client_of(args) as client:
        videos = [client.submit(**body) for body in wanted]
        if not args.wait and args.out is None:
            for video in videos:
                print(json.dumps(dict(video.content)) if args.json else video.id)
            return 0
        try:
            for video, path in zip(videos, paths, strict=True):
                finish(client, video, path, args)
        except KeyboardInterrupt:
            ids = " ".join(video.id for video in videos)
            print(f"the server goes on: vstar-engine status {ids}; vstar-engine cancel {ids}", file=sys.stderr)
            raise
    return 0


def named(out: Path | None, count: int) -> list[Path | None]:
    """Returns the file of each video."""
    if out is None:
        return [None] * count
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"a server sends mp4 files, got {out.name!r}")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i:03d}") for i in range(1, count + 1)]


def finish(client: "Client", video: "RemoteVideo", path: Path | None, args: argparse.Namespace) -> None:
    """Waits for a job with a progress bar, and writes its video."""
    with tqdm(total=100, desc=video.id[:14], unit="%", file=sys.stderr, disable=None) as bar:

        def progress(now: "RemoteVideo") -> None:
            bar.update(now.progress - bar.n)

        done = client.wait(video.id, progress)
    if path is not None:
        client.fetch(video.id, path, force=args.force)
    if args.json:
        print(json.dumps({**done.content, **({"file": str(path)} if path else {})}))
    else:
        print(video.id if path is None else f"wrote {path} ({video.id})")


def run_status(args: argparse.Namespace) -> int:
    """Prints a line for each job; returns 1 if a named one has failed."""
    with client_of(args) as client:
        videos = [client.status(id) for id in args.id] or list(client.list(LISTED))
    for video in videos:
        print(json.dumps(dict(video.content)) if args.json else printable(line(video)))
    return int(any(video.error for video in videos if args.id))


def line(video: "RemoteVideo") -> str:
    """Returns one line about a job."""
    told = {"in_progress": f"{video.progress} %"}.get(video.status, "")
    if video.error:
        told = str(video.error.get("code"))
    told_by_server = f"{video.id}  {video.status:11} {told:>14}  {str(video.content.get('prompt') or '')[:60]}"
    # a line break would make two jobs of one, an escape sequence would move the cursor
    return "".join(letter if letter.isprintable() else " " for letter in told_by_server)


def run_fetch(args: argparse.Namespace) -> int:
    """Downloads the video of a completed job."""
    ending = {"video": ".mp4"}.get(args.variant, f".{args.variant}.jpg")
    path = args.out or Path(args.id + ending)
    with client_of(args) as client:
        video = client.status(args.id)
        if not video.ended or video.error:
            raise ValueError(f"there is nothing to fetch: {args.id} is {video.status}, {video.progress} %")
        client.fetch(args.id, path, args.variant, args.force)
    print(json.dumps({**video.content, "file": str(path)}) if args.json else f"wrote {path}")
    return 0


def run_cancel(args: argparse.Namespace) -> int:
    """Stops jobs."""
    with client_of(args) as client:
        for video in map(client.cancel, args.id):
            print(json.dumps(dict(video.content)) if args.json else printable(line(video)))
    return 0
