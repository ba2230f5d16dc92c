"""Frame attention on a CPU against PyTorch's plain attention, and what a GPU has to do for it, counted.

python -m vstar_engine.bench.ops.frame_attention
"""

import math
import sys

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vstar_engine.bench.harness.timing import interleave
from vstar_engine.kernels.frame_attention import frame_attention, frame_attention_ref
from vstar_engine.kernels.problems import FrameTables
from vstar_engine.sampling.tar import toeplitz

ROUNDS = 7
# latent frames, tokens a frame, heads, head width of the problem that is timed
TIMED = (9, 240, 2, 128)
# of Wan 2.1 1.3B and 14B at 480 x 832 and 81 frames
COUNTED = {"Wan 1.3B": (21, 1560, 12, 128), "Wan 14B": (21, 1560, 40, 128)}


def rules(frames: int, tokens: int) -> dict[str, FrameTables]:
    """Returns the rules of the dials for a clip."""
    first, far = torch.zeros(2, frames, frames)
    first[1:, 0] = math.log(0.6)
    far[0, frames // 2 + 1 :] = -math.inf
    return {
        "reference=": FrameTables(b=first),
        "decay=": FrameTables(b=far, decay=0.9, beyond=frames * tokens // 4),
        "tar=": FrameTables(g=toeplitz(frames, 2.0)),
    }


def timed() -> str:
    """Times one thread and returns a table; raises AssertionError for a rule whose result is wrong."""
    frames, tokens, heads, head_dim = TIMED
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, frames * tokens, heads, head_dim)
    plain = [x.transpose(1, 2) for x in (q, k, v)]

    def by(tables: FrameTables) -> Tensor:
        return frame_attention(q, k, v, tables, tokens)

    calls = {"plain attention": lambda: scaled_dot_product_attention(*plain)}
    for name, tables in rules(frames, tokens).items():
        torch.testing.assert_close(by(tables), frame_attention_ref(q, k, v, tables, tokens), rtol=1e-4, atol=1e-5)
        calls[name] = lambda tables=tables: by(tables)  # type: ignore[misc]
    taken = interleave(calls, ROUNDS, 1)
    base = taken["plain attention"].median
    rows = [
        f"| {name} | {1e3 * t.median:.0f} [{1e3 * t.p20:.0f}, {1e3 * t.p80:.0f}] | {t.median / base:.2f} |"
        for name, t in taken.items()
    ]
    return "\n".join(["| rule | ms | of plain |", "|---|--:|--:|", *rows])


def counted() -> str:
    """Counts a layer's products and the bytes of its tensors, in half precision, for a batch of one; returns a table."""
    rows = []
    for name, (frames, tokens, heads, head_dim) in COUNTED.items():
        count = frames * tokens
        product = 2 * count**2 * head_dim * heads / 1e12
        moved = 4 * count * heads * head_dim * 2 / 1e9
        mask = count**2 * 2 / 1e9
        rows.append(f"| {name} | {2 * product:.1f} | {3 * product:.1f} | {moved:.2f} | {mask:.1f} |")
    head = "| layer | TFLOP, one sweep | TFLOP with tar= | GB read and written | GB of a mask that is not made |"
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows])


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"{timed()}\n\n{counted()}\n")
