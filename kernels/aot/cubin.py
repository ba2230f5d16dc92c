"""Reads from a cubin what it takes of a GPU, with the tools that Triton brings."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def find(pattern: str, text: str, of: Path) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{of} does not say {pattern!r}")
    return found


def _widths(kind: str, accesses: list[str]) -> dict[str, Any]:
    """Counts accesses of 128 and of 32 bits, and names the others."""
    wide = sum(".128" in name for name in accesses)
    odd = [name for name in accesses if re.search(r"\.(U8|S8|U16|S16|64)\b", name)]
    return {f"{kind}_128": wide, f"{kind}_32": len(accesses) - wide - len(odd), f"{kind}_other": sorted(set(odd))}


def inspect_cubin(path: Path) -> dict[str, Any]:
    """Reads registers, stack, local memory and the instructions that matter from a cubin."""
    usage = find(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(path)), path)
    instruction = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.M)
    instructions = instruction.findall(_tool("cuobjdump", "-sass", str(path)))
    families = Counter(name.split(".")[0] for name in instructions)
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "local": int(usage[3]),
        "spills": families["LDL"] + families["STL"],
        "instructions": len(instructions),
        **_widths("loads", [name for name in instructions if name.split(".")[0] in ("LDG", "LDGSTS")]),
        **_widths("stores", [name for name in instructions if name.split(".")[0] == "STG"]),
        "tensor_core": sorted(name for name in families if re.fullmatch(r"HMMA|QMMA|HGMMA|QGMMA|UTC\w*MMA", name)),
    }
