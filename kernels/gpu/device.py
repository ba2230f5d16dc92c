"""The GPU that a launch is for."""

from typing import NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """What a launch depends on; with 0 multiprocessors programs walk as many positions as they may."""

    arch: int
    multiprocessors: int


INTERPRETED = Device(90, 0)


def device(x: Tensor) -> Device:
    """Returns the device of `x`: its GPU, or INTERPRETED for a tensor on the CPU."""
    if not x.is_cuda:
        return INTERPRETED
    found = torch.cuda.get_device_properties(x.device)
    return Device(10 * found.major + found.minor, found.multi_processor_count)
