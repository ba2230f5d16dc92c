"""The plugins' kernels on a GPU: loaded and launched by the driver as a plugin launches them, cubins and PTX alike."""

import ctypes

import pytest
import torch

from support.accuracy import assert_as_accurate

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES
from vstar_engine.kernels.temporal_attention import temporal_attention_ref
from vstar_engine.kernels.tensorrt.tactics import SHARED_WITHOUT_ASKING, compile_tactic, tactics

DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
FALLBACK = ARCHITECTURES[0]


def launch(kernel, code, hidden, programs, tensors, integers, stream=0):
    """Launches compiled code through libcuda: inputs, integers, output, then `hidden` null pointers."""
    driver = ctypes.CDLL("libcuda.so.1")

    def must(status):
        assert status == 0, f"the driver answers {status}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    must(driver.cuModuleLoadData(ctypes.byref(module), code))
    must(driver.cuModuleGetFunction(ctypes.byref(function), module, kernel.entry_point.encode()))
    if kernel.shared > SHARED_WITHOUT_ASKING:
        must(driver.cuFuncSetAttribute(function, DYNAMIC_SHARED_BYTES, kernel.shared))
    *inputs, out = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    values = [*inputs, *map(ctypes.c_int32, integers), out, *(ctypes.c_void_p() for _ in range(hidden))]
    arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    size = (programs, 1, 1, kernel.threads, 1, 1, kernel.shared)
    must(driver.cuLaunchKernel(function, *size, ctypes.c_void_p(stream), arguments, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["cubin", "ptx", "fallback"])
def test_every_tactic_on_a_gpu(kind, dtype):
    major, minor = torch.cuda.get_device_capability()
    arch = FALLBACK if kind == "fallback" else 10 * major + minor
    if arch not in ARCHITECTURES:
        pytest.skip(f"needs a GPU of sm_{', sm_'.join(map(str, ARCHITECTURES))}, this one is sm_{arch}")
    batch, positions, heads, head_dim = 2, 37, 5, 64
    # every tile once, with the shorter of its runs, and the sweep
    for tactic in tactics(head_dim, dtype, arch)[::2]:
        kernel = compile_tactic(tactic, head_dim, dtype, arch)
        code, hidden = (kernel.cubin, kernel.hidden) if kind == "cubin" else (kernel.ptx.encode() + b"\0", 0)
        for frames, rows in ((7, 2), (16, 1), (33, 2), (130, 1)):
            q, k, v = torch.randn(3, batch, frames, positions, heads, head_dim).to(getattr(torch, DTYPES[dtype].torch)).cuda()
            g, out = torch.randn(rows, frames, device="cuda"), torch.full_like(q, torch.nan)
            programs = tactic.programs(batch, frames, positions, heads, lambda a, b: -(-a // b), lambda a, b: int(a < b))
            integers = (frames, positions, heads, tactic.run, frames if rows > 1 else 0)
            launch(kernel, code, hidden, programs, (q, k, v, g, out), integers, torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            exact = temporal_attention_ref(q.double(), k.double(), v.double(), g.double())
            assert_as_accurate(out, temporal_attention_ref(q, k, v, g), exact)
