"""Results as JSON lines: one row a provider, on disk before the next one starts, and a last row that says the run ended.

A row: schema, run, at, command, suite, case (what was asked for), provider (who answered), dtype, device, status, note, numbers
(seconds, bytes, shares), ceilings (of the same contest) and machine. A run without its last row was interrupted.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .machine import machine

SCHEMA = 2
OK, WRONG, ABSENT, FAILED, SKIPPED = "ok", "WRONG", "not installed", "failed", "skipped"
COMPLETE, INTERRUPTED = "complete", "interrupted"
# marks a share of a ceiling that is above it
ABOVE = "†"


@dataclass(frozen=True)
class ResultRow:
    """One provider's answer to one case. `status` is OK or says why there are no numbers, `note` in a sentence."""

    suite: str
    case: Mapping[str, Any]
    provider: str
    dtype: str = ""
    device: str = ""
    status: str = OK
    note: str | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""
    at: str = ""
    command: str = ""
    outcome: str = COMPLETE

    @property
    def key(self) -> str:
        """Names what two runs may compare."""
        return json.dumps([self.suite, sorted(self.case.items()), self.provider, self.dtype, self.device])

    @property
    def title(self) -> str:
        words = " ".join(f"{name} {value}" for name, value in self.case.items())
        return f"{self.suite}: {words}: {self.provider}"


class ResultFile:
    """Appends a run's rows to a file, flushed one by one, and prints each; remembers what went wrong."""

    def __init__(self, path: Path | None, command: str):
        self.path = path
        self.machine = machine()
        self.command = command
        self.run = f"{time.time_ns():x}-{os.getpid():x}"
        self.failures: list[str] = []
        if path is not None and path.exists():
            read([path])
            whole = path.read_text().rpartition("\n")
            path.write_text(whole[0] + whole[1])  # without a line that was cut off
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._append({"outcome": COMPLETE if kind is None else INTERRUPTED})

    def write(self, row: ResultRow) -> ResultRow:
        """Records a row of this run and returns it as it is recorded."""
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = replace(row, machine=self.machine, run=self.run, at=at, command=self.command)
        if row.status in (WRONG, FAILED):
            self.failures.append(row.title)
        content = asdict(row)
        del content["outcome"]
        self._append(content)
        print(f"{row.title}: {words(row)}", flush=True)
        return row

    def _append(self, content: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"schema": SCHEMA, "run": self.run, **content}) + "\n")


def read(paths: Iterable[Path]) -> list[ResultRow]:
    """Reads result files; rows of a run that did not end have the outcome `interrupted`.

    A row timed alone counts where its run has none of the rounds in turn.

    Raises ValueError, with what would do, for a file that is not there or was written with another schema.
    """
    rows: list[ResultRow] = []
    ended: dict[str, str] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"no results at {path}; make some with `vstar-engine bench kernels --out {path}`")
        for content in _lines(path):
            schema = content.pop("schema", 1)
            if schema != SCHEMA:
                commit = str(content.get("machine", {}).get("commit"))[:12]
                raise ValueError(
                    f"{path} was written with schema {schema} and this is schema {SCHEMA}: measure again into another file, "
                    f"or read it with the version that wrote it (commit {commit})"
                )
            if "outcome" in content:
                ended[content["run"]] = content["outcome"]
            else:
                rows.append(ResultRow(**content))
    in_turn = {(row.run, row.key) for row in rows if not row.numbers.get("alone")}
    kept = (row for row in rows if not row.numbers.get("alone") or (row.run, row.key) not in in_turn)
    return [replace(row, outcome=ended.get(row.run, INTERRUPTED)) for row in kept]


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines):  # cut off while it was written: the run has no last row either
                return
            raise ValueError(f"{path}, line {number}, is not JSON ({error}): not a results file") from error


def words(row: ResultRow) -> str:
    """Returns what a row measured as text."""
    if row.status != OK:
        return row.status + (f", {row.note}" if row.note else "")
    numbers = row.numbers
    said = []
    if "median" in numbers:
        said.append(f"{seconds(numbers['median'])} [{seconds(numbers['p20'])}, {seconds(numbers['p80'])}]")
    for name, what in (
        ("share_of_bandwidth", "bandwidth"),
        ("share_of_matrix", "matrix peak"),
        ("share_of_floor", "the floor's speed"),
    ):
        if numbers.get(name) is not None:
            said.append(f"{share(numbers[name])} of {what}")
    if numbers.get("floor") is not None:
        said.append(f"floor {seconds(numbers['floor'])}")
    if "by" in numbers:
        said.append(f"{rate(numbers)} at best by {numbers['by']}")
    if numbers.get("peak_bytes") is not None:
        said.append(f"{numbers['peak_bytes'] / 2**20:.0f} MiB")
    if numbers.get("error") is not None:
        said.append(f"error {numbers['error']:.1e}")
    if numbers.get("alone"):
        said.append("timed alone")
    return ", ".join(said) or ", ".join(f"{name} {value}" for name, value in numbers.items())


def share(value: float) -> str:
    """Writes a share of a ceiling, marked where it is above."""
    said = f"{value:.0%}"
    return f"{said} {ABOVE}" if round(value, 2) > 1 else said


def rate(numbers: Mapping[str, Any]) -> str:
    """Writes how many bytes or FLOPs a second a ceiling's calls reached."""
    if "flops_per_second" in numbers:
        return f"{numbers['flops_per_second'] / 1e9:.3g} GFLOP/s"
    return f"{numbers['bytes_per_second'] / 1e9:.3g} GB/s"


def seconds(value: float) -> str:
    """Writes a duration with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 1000 else f"{value / size:.0f} {unit}"
    return f"{value * 1e6:.3g} us"


def sentence(error: BaseException) -> str:
    """Returns an exception's type and the first line that says something, for a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
