"""Writes the kernels that the C++ plugin embeds: kernels.S and kernels.cpp.

    python -m vstar_engine.kernels.tensorrt --arch 80,90,120 --head-dim 64 --dtype fp16,bf16,fp32 --out DIR

csrc/tensorrt/CMakeLists.txt runs it.
"""

import argparse
from pathlib import Path

from vstar_engine.kernels.aot.selection import check, numbers, words
from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES

from .embed_cubins import embedded, write


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m vstar_engine.kernels.tensorrt", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=numbers, default=list(ARCHITECTURES), help="compute capabilities, such as 80,90")
    parser.add_argument("--head-dim", type=numbers, default=[64])
    parser.add_argument("--dtype", type=words, default=list(DTYPES))
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    try:
        check(chosen.arch, chosen.dtype)
    except ValueError as error:
        parser.error(str(error))
    found = list(embedded(chosen.arch, chosen.head_dim, chosen.dtype))
    digest = write(found, chosen.out)
    print(f"{len(found)} kernels in {chosen.out}, {sum(len(kernel.code) for kernel in found)} bytes, hash {digest[:12]}")


if __name__ == "__main__":
    main()
