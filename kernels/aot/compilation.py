"""Compiles launch-table entries to PTX and cubin without a GPU, keeps a record of each, and names what would run badly."""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vstar_engine.kernels.gpu.temporal_attention_launch import SHARED_LIMIT

from .attention_entries import Entry
from .cubin import find, inspect_cubin
from .frame_entries import FrameEntry
from .fused_entries import FusedEntry

FORMAT = 2
Compilable = Entry | FusedEntry | FrameEntry


def key_of(entry: Compilable) -> str:
    """Returns the hash of everything that shapes the compiled code."""
    return hashlib.sha256(json.dumps([FORMAT, triton.__version__, entry.kernel.cache_key, asdict(entry)]).encode()).hexdigest()


def compile_entry(entry: Compilable) -> Any:
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
    options = {"num_warps": entry.warps, **({"maxnreg": entry.registers} if isinstance(entry, FrameEntry) else {})}
    return triton.compile(source, target=GPUTarget("cuda", entry.arch, 32), options=options)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


def faults(entry: Compilable, record: dict[str, Any]) -> list[str]:
    """Returns a sentence for each fault of a compiled entry."""
    found = []
    if record["spills"] or record["stack"] or record["local"]:
        found.append(f"spills: {record['spills']} local loads and stores, {record['stack']} bytes of stack")
    if record["shared"] > SHARED_LIMIT[entry.arch]:
        found.append(f"needs {record['shared']} bytes of shared memory where sm_{entry.arch} has {SHARED_LIMIT[entry.arch]}")
    if record["hidden_parameters"] < 0 or record["scratch"]:
        found.append(f"has {record['parameters']} parameters and {record['scratch']} bytes of scratch; the launcher gives none")
    return [f"{entry.name} {sentence}" for sentence in (*found, *entry.faults(record))]


def build(entry: Compilable, out: Path) -> dict[str, Any]:
    """Returns an entry's record; compiles it where `out` has none that is whole."""
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
    declared = find(r"\.entry[^{]*", text, ptx)[0].count(".param")
    constants = entry.constants()
    record = {
        "name": entry.name,
        "key": key,
        **asdict(entry),
        "entry_point": metadata.name,
        "target": find(r"\.target\s+(\w+)", text, ptx)[1],
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


def attempt(entry: Compilable, out: Path) -> dict[str, Any] | str:
    """Returns an entry's record, or a sentence where its compilation failed."""
    try:
        return build(entry, out)
    except (RuntimeError, ValueError, triton.CompilationError, subprocess.CalledProcessError) as error:
        return f"{entry.name} has no artifact: {type(error).__name__}: {str(error).strip().splitlines()[0]}"


def compile_all(wanted: Sequence[Compilable], out: Path, jobs: int) -> dict[str, Any]:
    """Compiles entries into a folder and returns its manifest, which is written there too."""
    out.mkdir(parents=True, exist_ok=True)
    # spawned: a forked copy of Triton's compiler threads would hang
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        results = list(pool.map(partial(attempt, out=out), wanted))
    records = {record["name"]: record for record in results if not isinstance(record, str)}
    sentences = [sentence for sentence in results if isinstance(sentence, str)]
    for entry in wanted:
        if entry.name in records:
            sentences += faults(entry, records[entry.name])
    manifest = {"kind": "kernels", "triton": triton.__version__, "entries": list(records.values()), "faults": sentences}
    _write_json(out / "manifest.json", manifest)
    return manifest
