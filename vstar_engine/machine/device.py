"""Devices and dtypes by name; a device is tried with a small computation."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from vstar_engine.config.models import DTYPE_NAMES
from vstar_engine.errors import DeviceError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def dtype_named(name: str) -> torch.dtype:
    """Returns a dtype by name; ValueError lists the known ones."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def device_named(name: str, dtype: torch.dtype) -> torch.device:
    """Returns a device by name; DeviceError unless it exists and computes in `dtype`."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {name!r}; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"there is no device {name}: PyTorch {torch.__version__} sees no CUDA device here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"there is no device {name}: the last one is cuda:{torch.cuda.device_count() - 1}")
    try:
        x, weight = torch.ones(1, 32, 4, 4, device=device, dtype=dtype), torch.ones(32, 32, 3, 3, device=device, dtype=dtype)
        h = F.gelu(F.group_norm(F.conv2d(x, weight), 32)).flatten(2).mT[:, None]
        F.scaled_dot_product_attention(h, h, h) @ weight[:, :, 0, 0]
    except RuntimeError as error:
        raise DeviceError(f"device {name} cannot compute in {dtype}: {str(error).splitlines()[0]}") from error
    return device


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current device inside the block, as libraries other than PyTorch need; does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def described(device: torch.device) -> str:
    """Names the processor that code is compiled for: "cpu AVX512", "NVIDIA H200 sm_90"."""
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
