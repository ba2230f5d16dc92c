"""Plans that TensorRT for RTX builds in a child process, and what a UNet's must be like."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import tensorrt_wheels

FOUR = ["SM80", "SM86", "SM89", "SM120"]
RANGES = {"batch": [1, 2, 4], "positions": [1, 48, 160]}


def job(
    onnx: Path,
    nodes: int,
    plugin: str = "python",
    frames: Sequence[int] = (16,),
    ranges: dict[str, list[int]] = RANGES,
    out: Path | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Describes a plan that TensorRT for RTX is to build of a file whose `nodes` become plugin layers."""
    written = {"onnx": str(onnx), "out": str(out or onnx.with_suffix(".plan"))}
    return {**written, "nodes": nodes, "plugin": plugin, "frames": frames, "ranges": ranges, **more}


def built(*jobs: dict[str, Any], fault: str = "") -> list[dict[str, Any]]:
    """Has one child process build plans; returns each one's facts, or the sentence that refused it."""
    made: list[dict[str, Any]] = tensorrt_wheels.child("tensorrt_rtx_build.py", tensorrt_wheels.rtx(), jobs=jobs, fault=fault)
    return made


def check_unet(
    file: Path,
    nodes: int,
    kind: str,
    out: Path,
    frames: Sequence[int] = (16,),
    targets: Sequence[str] = ("SM89",),
    sides: dict[str, list[int]] | None = None,
) -> None:
    """Builds a UNet whose batch and frames are free; each node must be configured as a plugin for each profile.

    Each further profile or target takes the builder about as long again.
    """
    ranges = {"batch": [1, 2, 2], **(sides or {})}
    (result,) = built(job(file, nodes, frames=frames, ranges=ranges, targets=targets, out=out))
    assert result.get("plugin_layers") == nodes > 0, result
    assert len(result["configured"]) == len(frames) * nodes
    assert {tuple(named for named, _, _ in tensors) for tensors in result["configured"]} == {(kind, kind, kind, "FLOAT", kind)}
    starts = (1, *(count + 1 for count in frames[:-1]))
    seen = {(tensors[0][1][1], tensors[0][2][1]) for tensors in result["configured"]}
    assert seen == set(zip(starts, frames, strict=True))
    assert out.stat().st_size == result["bytes"]
