"""Two measurements side by side, with a verdict that respects their spread; or this engine against another commit's.

A provider is slower or faster only where the middle three fifths of both lie apart and the medians differ by more than the
threshold, on one machine. `--against REF MEASUREMENT...` installs REF in a scratch worktree, gives it this commit's harness,
and measures both in turn: `vstar-engine bench compare --against HEAD~1 kernels --frames 64 --providers ours`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from vstar_engine.bench.harness.ceilings import BANDWIDTH, MATRIX
from vstar_engine.bench.harness.machine import COMMIT
from vstar_engine.bench.harness.rows import INTERRUPTED, OK, SKIPPED, ResultRow, read, seconds
from vstar_engine.bench.report.table_cells import markdown

THRESHOLD = 0.03
ROOT = Path(__file__).parents[2]
SAME, SLOWER, FASTER = "within the spread", "slower", "faster"
BROKEN, MENDED, NEW, GONE = "broken", "mended", "only in the second", "only in the first"
ELSEWHERE = "another machine"
# of a row's machine: what makes it another, and what may explain a difference
HARDWARE = ("gpu", "gpu_memory", "cpu", "cores", "threads")
SOFTWARE = ("driver", "cuda", "cudnn", "cpu_kernel", "waiting", "system", "python", "torch", "triton", "numpy", "xformers")


@dataclass(frozen=True)
class Span:
    """One provider's rows on one side, pooled: the median of medians and the outermost fifths, or why there are none."""

    title: str
    median: float | None
    p20: float
    p80: float
    status: str
    interrupted: bool = False

    @staticmethod
    def of(rows: Sequence[ResultRow]) -> "Span":
        cut = any(row.outcome == INTERRUPTED for row in rows)
        right = [row for row in rows if row.status == OK and "median" in row.numbers]
        if not right or any(row.status not in (OK, SKIPPED) for row in rows):
            status = next((row.status for row in rows if row.status != OK), SKIPPED)
            return Span(rows[0].title, None, 0.0, 0.0, status, cut)
        middle = median(row.numbers["median"] for row in right)
        low, high = min(row.numbers["p20"] for row in right), max(row.numbers["p80"] for row in right)
        return Span(rows[0].title, middle, low, high, OK, cut)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two sides."""
    parser.add_argument("--against", metavar="REF", help="a commit to build and measure, instead of files")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each side with --against (default %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="differences below it are none (default %(default)s)"
    )
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="A.jsonl B.jsonl | MEASUREMENT...")


def pooled(path: Path) -> dict[str, list[ResultRow]]:
    """Reads one side: the rows of each provider."""
    found: dict[str, list[ResultRow]] = {}
    for row in read([path]):
        if row.provider not in (BANDWIDTH, MATRIX) and (row.status != OK or "median" in row.numbers):
            found.setdefault(row.key, []).append(row)
    return found


def differing(first: Collection[ResultRow], second: Collection[ResultRow], names: Sequence[str]) -> list[str]:
    """Says which of some facts of the machine the two sides do not share."""
    said = []
    for name in names:
        before, after = (sorted({str(row.machine.get(name)) for row in rows}) for rows in (first, second))
        if before != after:
            said.append(f"{name} ({' and '.join(before)}; then {' and '.join(after)})")
    return said


def verdict(before: Span | None, after: Span | None, threshold: float = THRESHOLD) -> str:
    """Says what became of a provider from the first side to the second."""
    if before is None or after is None:
        return NEW if before is None else GONE
    if before.median is None or after.median is None:
        if before.status == after.status:
            return after.status
        return MENDED if after.median is not None else BROKEN if before.median is not None else after.status
    if after.p20 > before.p80 and after.median > before.median * (1 + threshold):
        return SLOWER
    if after.p80 < before.p20 and after.median < before.median * (1 - threshold):
        return FASTER
    return SAME


def compared(first: Path, second: Path, threshold: float) -> tuple[str, list[str]]:
    """Returns the table of two result files, its remarks, and the titles of what got slower, broke or disappeared."""
    before, after = pooled(first), pooled(second)
    common = before.keys() & after.keys()
    if not common:
        raise ValueError(f"{first} and {second} measured nothing in common: nothing to compare")
    old, new = ([row for key in common for row in rows[key]] for rows in (before, after))
    machines, versions = differing(old, new, HARDWARE), differing(old, new, SOFTWARE)
    body, worse = [], []
    for key in dict.fromkeys([*before, *after]):
        a, b = (Span.of(rows[key]) if key in rows else None for rows in (before, after))
        says = verdict(a, b, threshold)
        if machines and says in (SLOWER, FASTER):
            says = ELSEWHERE
        title = (a or b).title  # type: ignore[union-attr]
        if says in (SLOWER, BROKEN, GONE):
            worse.append(title)
        ratio = f"{b.median / a.median:.3f}" if a and b and a.median and b.median else ""
        body.append([title, _words(a), _words(b), ratio, says])
    said = [markdown(["", "first", "second", "second / first", "verdict"], body)]
    if machines:
        said.append(f"warning: two machines, whose ratios are no regressions; they differ in {', '.join(machines)}")
    if versions:
        said.append(f"warning: the sides differ in {', '.join(versions)}")
    return "\n\n".join(said), worse


def _words(span: Span | None) -> str:
    if span is None:
        return ""
    said = span.status if span.median is None else f"{seconds(span.median)} [{seconds(span.p20)}, {seconds(span.p80)}]"
    return f"{said}, interrupted" if span.interrupted else said


def run(args: argparse.Namespace) -> int:
    """Prints the comparison; 1 where something got slower, broke or disappeared."""
    if args.against:
        with tempfile.TemporaryDirectory(prefix="vstar-against-") as scratch:
            first, second = measured_both(args.against, args.rest, args.repeats, Path(scratch))
            table, worse = compared(first, second, args.threshold)
    elif len(args.rest) == 2:
        table, worse = compared(Path(args.rest[0]), Path(args.rest[1]), args.threshold)
    else:
        raise ValueError(f"compare takes two result files, or --against REF and a measurement, got {args.rest}")
    print(table)
    print(f"\nslower, broken or gone: {'; '.join(worse)}" if worse else "\nnothing got slower")
    return int(bool(worse))


def measured_both(ref: str, command: Sequence[str], repeats: int, scratch: Path) -> tuple[Path, Path]:
    """Measures REF (first) and this engine (second) in turn; returns their files."""
    if not command or command[0] not in ("kernels", "pipeline", "engine"):
        raise ValueError(f"--against needs a measurement: kernels, pipeline or engine and its flags, got {list(command)}")
    first, second = scratch / "first.jsonl", scratch / "second.jsonl"
    with installed(ref, scratch) as library:
        for _ in range(repeats):
            for path, folder in ((first, library), (second, None)):
                measure(command, path, folder)
    return first, second


def measure(command: Sequence[str], out: Path, library: Path | None) -> None:
    """Runs one measurement in a process of its own, with the engine in `library` or this one."""
    paths = [str(library or ROOT)] if library or (ROOT / "pyproject.toml").is_file() else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    environment.pop(COMMIT, None)  # git knows both sides
    words = [sys.executable, "-P", "-m", "vstar_engine.bench", *command, "--out", str(out)]
    done = subprocess.run(words, env=environment)
    if done.returncode not in (0, 1) or not out.exists():
        raise ValueError(f"the measurement ended with exit code {done.returncode}: {' '.join(words[4:])}")


@contextmanager
def installed(ref: str, scratch: Path) -> Iterator[Path]:
    """Checks REF out beside this one, installs it there with this harness, and takes it all away again."""
    worktree = scratch / "worktree"
    git("worktree", "add", "--detach", str(worktree), ref)
    try:
        # below build/, which git ignores: rows then name REF's commit, and not as changed
        library = worktree / "build" / "against"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(library), str(worktree)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{ref} does not install: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        shutil.rmtree(library / "vstar_engine" / "bench", ignore_errors=True)
        shutil.copytree(
            Path(__file__).parents[1],
            library / "vstar_engine" / "bench",
            ignore=shutil.ignore_patterns("results", "__pycache__"),
        )
        yield library
    finally:
        git("worktree", "remove", "--force", str(worktree))


def git(*arguments: str) -> str:
    """Runs git on this checkout; ValueError with its complaint where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError("--against needs git") from error
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()
