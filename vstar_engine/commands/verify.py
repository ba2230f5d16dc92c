"""The `verify` command: golden cases against this installation."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vstar_engine.verification.verify import CaseVerdict


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "golden_dir", nargs="?", type=Path, help="folder with a manifest.json (default: tests/golden of the checkout)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--strict", action="store_true", help="fail on kinds of cases that this version does not know, too")
    parser.add_argument("--json", action="store_true", help="print a JSON object per case")


def run(args: argparse.Namespace) -> int:
    from vstar_engine.machine.device import device_named, dtype_named
    from vstar_engine.verification.golden import Golden
    from vstar_engine.verification.verify import verify

    shipped = Path(__file__).parents[2] / "tests" / "golden"
    if args.golden_dir is None and not shipped.is_dir():
        raise ValueError("no golden cases lie beside this installation; give a folder: vstar-engine verify FOLDER")
    folder = args.golden_dir or shipped
    golden = Golden(folder)
    device = device_named(args.device, dtype_named("float32"))
    verdicts: list[bool | None] = []
    for row in verify(golden, str(device)):
        print(json.dumps(asdict(row)) if args.json else _line(row), flush=True)
        verdicts.append(row.ok)
    passed, unknown = verdicts.count(True), verdicts.count(None)
    if not args.json:
        said = f"; {unknown} more are of kinds not known to this version" if unknown else ""
        print(f"{passed} of {len(verdicts) - unknown} cases agree with {folder}{said}")
    return 1 if False in verdicts or not verdicts or (args.strict and unknown) else 0


def _line(row: "CaseVerdict") -> str:
    verdict = {True: "ok", False: "FAILED", None: "-"}[row.ok]
    numbers = f"{row.worst.error:9.2e} <= {row.worst.tolerance:.1e} {row.worst.output}" if row.worst else row.note
    if row.worst and not row.ok:
        numbers = numbers.replace("<=", "> ")
    return f"{row.kind:24} {row.name:34} {verdict:6} {numbers}"
