"""Compiles every launch-table entry of the Triton kernels to PTX and cubin without a GPU, and refuses what would run badly.

    python -m vstar_engine.kernels.aot.__main__ --arch 80,86,89,90,100,120 --out DIR [--head-dim 64] [--dtype fp16]

DIR receives a .ptx, a .cubin and a .json record for each entry and one manifest.json over all. A record is reused while its
key (kernel source, Triton version, entry) and its files' sha256 stand. The exit status is 1, with one sentence for each
fault on stderr, when an entry spills, outgrows its architecture's shared memory, loads or stores a tile through less than 128
bits at a time, lacks the tensor-core instruction it claims, wants hidden scratch memory, or has no artifact.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vstar_engine.kernels.gpu import temporal_attention as kernels
from vstar_engine.kernels.gpu.temporal_attention_launch import (
    ARCHITECTURES,
    DTYPES,
    HEAD_DIMS,
    SHARED_LIMIT,
    Config,
    configs,
    padded,
)

from .entries import FusedEntry, fused_entries

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = ("q", "k", "v", "bias", "out")
FORMAT = 2


@dataclass(frozen=True)
class Entry:
    """One kernel of the launch table as it is compiled: `even` has no masks, `dense` takes a matrix for a bias."""

    arch: int
    dtype: str
    head_dim: int
    config: Config
    even: bool
    dense: bool

    @property
    def name(self) -> str:
        form = f"sweep{self.config.rows}x{self.config.keys}" if self.config.sweep else f"tile{self.config.rows}"
        kind = "dense" if self.dense else "even" if self.even else "ragged"
        return f"temporal_attention_{form}_d{self.head_dim}_{self.dtype}_{kind}_sm{self.arch}"

    @property
    def kernel(self) -> Any:
        return kernels.kernel(self.config)

    @property
    def warps(self) -> int:
        return self.config.warps

    def argument(self, name: str) -> tuple[str, bool]:
        """Returns an argument's type, and whether it is known to be a multiple of 16."""
        if name in POINTERS:
            return "*fp32" if name == "bias" else f"*{self.dtype}", True
        return ("fp32" if name == "scale" else "i32"), False

    def constants(self) -> dict[str, Any]:
        """Returns the constexprs, for strides that are multiples of 16 bytes."""
        unit = 16 // DTYPES[self.dtype].bytes
        return kernels.constants(self.config, self.head_dim, unit, self.dense, self.even, widen=False)


def entries(archs: list[int], head_dims: list[int], dtypes: list[str]) -> list[Entry]:
    """Lists every kernel that the launch table can choose."""
    return [
        Entry(arch, dtype, head_dim, config, even, dense)
        for arch in archs
        for dtype in dtypes
        for head_dim in head_dims
        for config in configs(head_dim, dtype, arch)
        for even, dense in ((True, False), (False, False), (False, True))
        if not even or head_dim == padded(head_dim)
    ]


def key_of(entry: Entry | FusedEntry) -> str:
    """Hashes everything that shapes the compiled code."""
    return hashlib.sha256(json.dumps([FORMAT, triton.__version__, entry.kernel.cache_key, asdict(entry)]).encode()).hexdigest()


def compile_entry(entry: Entry | FusedEntry) -> Any:
    """Compiles one entry as the launcher would: 16-byte aligned pointers and strides, no other assumption."""
    kernel, constants = entry.kernel, entry.constants()
    signature, attributes, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(index,)] = constants[name]
        else:
            signature[name], aligned = entry.argument(name)
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options={"num_warps": entry.warps})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _find(pattern: str, text: str, of: Path) -> re.Match[str]:
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
    usage = _find(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(path)), path)
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


def tensor_core(entry: Entry) -> str | None:
    """Names the tensor-core instruction that an entry claims: None for IEEE float32."""
    if entry.dtype == "fp32":
        return None
    large = entry.config.rows >= 64 and entry.config.warps >= 4
    return {90: "HGMMA", 100: r"UTC\w*MMA"}.get(entry.arch, "HMMA") if large else "HMMA"


def faults(entry: Entry | FusedEntry, record: dict[str, Any]) -> list[str]:
    """Says in a sentence each what would make the compiled entry run badly or not at all."""
    found = []
    if record["spills"] or record["stack"] or record["local"]:
        found.append(f"spills: {record['spills']} local loads and stores, {record['stack']} bytes of stack")
    if record["shared"] > SHARED_LIMIT[entry.arch]:
        found.append(f"needs {record['shared']} bytes of shared memory where sm_{entry.arch} has {SHARED_LIMIT[entry.arch]}")
    if record["hidden_parameters"] < 0 or record["scratch"]:
        found.append(f"has {record['parameters']} parameters and {record['scratch']} bytes of scratch; the launcher gives none")
    found += entry.faults(record) if isinstance(entry, FusedEntry) else _tile_faults(entry, record)
    return [f"{entry.name} {sentence}" for sentence in found]


def _tile_faults(entry: Entry, record: dict[str, Any]) -> list[str]:
    """Looks at tensor cores and at how wide the tiles are loaded."""
    config, found = entry.config, []
    claimed = tensor_core(entry)
    if claimed and not any(re.fullmatch(claimed, name) for name in record["tensor_core"]):
        found.append(f"claims {claimed} but holds {record['tensor_core'] or 'no tensor-core instruction'}")
    if not entry.dense:
        threads = 32 * config.warps
        row_bytes = padded(entry.head_dim) * DTYPES[entry.dtype].bytes
        # the bias comes as 32-bit words: its own tile, and for a sweep the scan of g for where it ends
        bias = -(-config.rows * config.keys // threads) + (-(-kernels.SCAN.value // threads) if config.sweep else 0)
        # a sweep loads keys in three places and values in two; its queries, once a program, may be too few for 128 bits
        tile = (5 * config.keys if config.sweep else config.rows + 2 * config.keys) * row_bytes
        others = record["loads_other"] if not config.sweep or config.rows * row_bytes >= 16 * threads else []
        if others or record["loads_32"] > bias or record["loads_128"] * 16 * threads < tile:
            loads = f"{record['loads_128']} of 128 bits, {record['loads_32']} of 32, others {record['loads_other']}"
            found.append(f"loads its tiles through less than 128 bits at a time: {loads}")
    made, at_once = config.rows * padded(entry.head_dim) * DTYPES[entry.dtype].bytes, 16 * 32 * config.warps
    # a tile too small for 128 bits a thread is stored by fewer
    if record["stores_128"] * at_once < made // at_once * at_once:
        stores = f"{record['stores_128']} of 128 bits, {record['stores_32']} of 32, others {record['stores_other']}"
        found.append(f"stores its tile through less than 128 bits at a time: {stores}")
    return found


def build(entry: Entry | FusedEntry, out: Path) -> dict[str, Any]:
    """Returns the record of one entry, compiled now or found whole in `out`."""
    key = key_of(entry)
    stem = out / f"{entry.name}_{key[:12]}"
    record_path = stem.with_suffix(".json")
    if record_path.is_file():
        record: dict[str, Any] = json.loads(record_path.read_text())
        files = [(out / record[kind], record[f"{kind}_sha256"]) for kind in ("ptx", "cubin")]
        if record["key"] == key and all(p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() == h for p, h in files):
            return record
    compiled = compile_entry(entry)
    text, metadata = compiled.asm["ptx"], compiled.metadata
    ptx, cubin = stem.with_suffix(".ptx"), stem.with_suffix(".cubin")
    ptx.write_text(text)
    cubin.write_bytes(compiled.asm["cubin"])
    declared = _find(r"\.entry[^{]*", text, ptx)[0].count(".param")
    constants = entry.constants()
    record = {
        "name": entry.name,
        "key": key,
        **asdict(entry),
        "entry_point": metadata.name,
        "target": _find(r"\.target\s+(\w+)", text, ptx)[1],
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        "scratch": metadata.global_scratch_size + metadata.profile_scratch_size,
        "parameters": declared,
        "hidden_parameters": declared - (len(entry.kernel.arg_names) - len(constants)),
        "constexprs": constants,
        "triton": triton.__version__,
        "ptx": ptx.name,
        "ptx_sha256": hashlib.sha256(ptx.read_bytes()).hexdigest(),
        "cubin": cubin.name,
        "cubin_sha256": hashlib.sha256(cubin.read_bytes()).hexdigest(),
        **inspect_cubin(cubin),
    }
    _write_json(record_path, record)
    return record


def attempt(entry: Entry | FusedEntry, out: Path) -> dict[str, Any] | str:
    """As `build`, with the sentence of a compilation that failed in the record's place."""
    try:
        return build(entry, out)
    except (RuntimeError, ValueError, triton.CompilationError, subprocess.CalledProcessError) as error:
        return f"{entry.name} has no artifact: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vstar_engine.kernels.aot.__main__", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", type=numbers, default=list(ARCHITECTURES), help="compute capabilities, such as 80,90")
    parser.add_argument("--head-dim", type=numbers, default=list(HEAD_DIMS))
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=list(DTYPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    unknown = [*(set(chosen.arch) - set(ARCHITECTURES)), *(set(chosen.dtype) - set(DTYPES))]
    if unknown:
        parser.error(f"unknown {unknown}; architectures are {ARCHITECTURES}, dtypes {tuple(DTYPES)}")
    if not all(1 <= head_dim <= max(HEAD_DIMS) for head_dim in chosen.head_dim):
        parser.error(f"head widths lie between 1 and {max(HEAD_DIMS)}, got {chosen.head_dim}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    wanted: list[Entry | FusedEntry] = [
        *entries(chosen.arch, chosen.head_dim, chosen.dtype),
        *fused_entries(chosen.arch, chosen.dtype),
    ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    # spawned: a forked copy of Triton's compiler threads would hang
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        results = list(pool.map(partial(attempt, out=chosen.out), wanted))
    records = {r["name"]: r for r in results if not isinstance(r, str)}
    sentences = [r for r in results if isinstance(r, str)]
    for entry in wanted:
        if entry.name in records:
            sentences += faults(entry, records[entry.name])
    manifest = {"kind": "kernels", "triton": triton.__version__, "entries": list(records.values()), "faults": sentences}
    _write_json(chosen.out / "manifest.json", manifest)
    sys.stdout.write(f"{len(records)} of {len(wanted)} kernels in {chosen.out}, {len(sentences)} faults\n")
    sys.stderr.writelines(f"{sentence}\n" for sentence in sentences)
    return 1 if sentences else 0


if __name__ == "__main__":
    raise SystemExit(main())
