"""Compares every case of a golden folder with the published numbers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vstar_engine.errors import VstarError

from .case import Finding, Judge
from .golden import Case, Golden
from .judges import KINDS

NOT_JUDGED = ("weights", "tar_width_table", "window_rules")
NOT_KNOWN = "not known to this version"


@dataclass(frozen=True)
class CaseVerdict:
    """The verdict of one case: its worst output, or a note why it was not judged; `ok` is None for an unknown kind."""

    kind: str
    name: str
    worst: Finding | None
    ok: bool | None
    note: str = ""


def verify(golden: Golden, device: str = "cpu") -> Iterator[CaseVerdict]:
    """Judges every case of a folder and yields a verdict for each; for weights and evidence only the checksum is compared."""
    for case in golden.cases:
        yield _judge(golden, case, torch.device(device))


@torch.no_grad()
def _judge(golden: Golden, case: Case, device: torch.device) -> CaseVerdict:
    kind, name = case["kind"], case["name"]
    damage = golden.damaged(case)
    if damage:
        return CaseVerdict(kind, name, None, False, damage)
    if kind in NOT_JUDGED:
        return CaseVerdict(kind, name, None, True, "checksum only")
    if kind not in KINDS:
        return CaseVerdict(kind, name, None, None, NOT_KNOWN)
    try:
        judge = Judge(golden, case, device)
        KINDS[kind](judge)
    except (ValueError, VstarError) as error:
        return CaseVerdict(kind, name, None, False, str(error))
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        return CaseVerdict(kind, name, None, False, f"{type(error).__name__}: {error}")
    if not judge.findings:
        return CaseVerdict(kind, name, None, False, f"{case['file']} stores no output that a case of kind {kind} is judged by")
    findings = [*judge.inputs, *judge.findings]
    worst = max(findings, key=lambda f: math.inf if math.isnan(f.error) else f.error / (f.tolerance or 1e-300))
    return CaseVerdict(kind, name, worst, all(finding.ok for finding in findings))
