"""Writes the kernels that the C++ plugin embeds, and their table.

Chosen architectures have cubins; sm_80's PTX serves all others.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES
from vstar_engine.kernels.source_hash import kernel_hash

from .tactics import RUNS, Compiled, Tactic, compile_tactic, tactics

# of later architectures than those with cubins, this one's PTX serves
FALLBACK = ARCHITECTURES[0]
# as `number_of` in csrc/tensorrt/plugin.cpp has them
NUMBERS = {name: number for number, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Embedded:
    """One row of the library's table."""

    arch: int
    dtype: str
    head_dim: int
    tactic: Tactic
    kernel: Compiled
    ptx: bool

    @property
    def code(self) -> bytes:
        # the driver reads PTX up to a zero byte
        return self.kernel.ptx.encode() + b"\0" if self.ptx else self.kernel.cubin

    def row(self, index: int) -> str:
        kernel, tactic = self.kernel, self.tactic
        numbers = (
            self.arch,
            NUMBERS[self.dtype],
            self.head_dim,
            tactic.frames,
            tactic.sweep.rows,
            kernel.threads,
            kernel.shared,
        )
        hidden, ptx = (0, "true") if self.ptx else (kernel.hidden, "false")
        return f'    {{{", ".join(map(str, numbers))}, {hidden}, {ptx}, vstar_kernel_{index}, "{kernel.entry_point}"}},'


def embedded(archs: list[int], head_dims: list[int], dtypes: list[str]) -> Iterator[Embedded]:
    """Compiles what is embedded: every tile once, since the run of positions is an argument of its launch."""
    for arch, ptx in [*((arch, False) for arch in archs), (FALLBACK, True)]:
        for dtype in dtypes:
            for head_dim in head_dims:
                for tactic in tactics(head_dim, dtype, arch):
                    if tactic.run != RUNS[1]:
                        yield Embedded(arch, dtype, head_dim, tactic, compile_tactic(tactic, head_dim, dtype, arch), ptx)


def write(found: list[Embedded], out: Path) -> str:
    """Writes the assembly that holds the code, and the table; returns the hash of both."""
    out.mkdir(parents=True, exist_ok=True)
    assembly, digest = ["    .section .rodata"], hashlib.sha256()
    for index, kernel in enumerate(found):
        path = out / f"kernel_{index}.bin"
        path.write_bytes(kernel.code)
        digest.update(kernel.row(index).encode() + kernel.code)
        label = f"vstar_kernel_{index}"
        assembly += [
            "    .balign 64",
            f"    .globl {label}",
            f"    .hidden {label}",
            f"{label}:",
            f'    .incbin "{path.absolute()}"',
        ]
    (out / "kernels.S").write_text("\n".join([*assembly, '    .section .note.GNU-stack,"",%progbits', ""]))
    declared = "\n".join(f'extern "C" unsigned char const vstar_kernel_{index}[];' for index in range(len(found)))
    rows = "\n".join(kernel.row(index) for index, kernel in enumerate(found))
    (out / "kernels.cpp").write_text(
        f'#include "kernels.h"\n\n{declared}\nchar const vstar_sources[] = "{kernel_hash()}";\n\n'
        f"namespace vstar {{\n\nKernel const kKernels[] = {{\n{rows}\n}};\n"
        f'int const kKernelCount = {len(found)};\nchar const kKernelHash[] = "{digest.hexdigest()}";\n'
        f"int const kRuns[2] = {{{RUNS[0]}, {RUNS[1]}}};\n\n}}  // namespace vstar\n"
    )
    return digest.hexdigest()
