"""The step of an ONNX engine that was built with --inline, in OpenVINO on the CPU: a rival, not a back end."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vstar_engine.backends.inputs import full
from vstar_engine.errors import MissingLibrary
from vstar_engine.networks.denoiser import Denoiser


def library() -> Any:
    """Imports OpenVINO."""
    try:
        import openvino
    except ImportError as error:
        raise MissingLibrary(f"OpenVINO is not installed ({error}); install it with `pip install openvino`") from error
    return openvino


class OpenVinoUnet(Denoiser):
    """Runs a UNet's ONNX file of standard operators, computing in float32 with as many threads as PyTorch."""

    def __init__(self, file: Path, dtype: torch.dtype):
        core = library().Core()
        # by default it computes in bfloat16 where the processor multiplies in it
        hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.request = core.compile_model(core.read_model(file), "CPU", hints).create_infer_request()
        self.dtype = dtype

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        given = full(latents.to(self.dtype), timestep, context, fps, tar)
        found = self.request.infer({name: tensor.numpy() for name, tensor in given.items()}, share_inputs=True)
        return torch.from_numpy(found[0])
