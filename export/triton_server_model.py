"""The orchestrator of a Triton Inference Server repository: runs the sampling loop and streams its progress.

Triton's Python back end loads this file as `vstar/1/model.py`. The networks are other models of the same server; tokens,
schedule, guidance and timelines are vstar_engine's own, which must be installed beside the server.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as triton
from torch import Tensor

from vstar_engine import Engine, Sampling, Tar
from vstar_engine.artifacts.built_engine import BuiltEngine
from vstar_engine.backends.inputs import full
from vstar_engine.config.models import model_named
from vstar_engine.config.request import Request
from vstar_engine.errors import VstarError
from vstar_engine.loading import LoadedModel
from vstar_engine.machine.device import dtype_named
from vstar_engine.networks.denoiser import Denoiser


class Cancelled(Exception):
    """The client went away."""


def call(model: str, output: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Runs another model of this server."""
    tensors = [triton.Tensor.from_dlpack(name, value.contiguous()) for name, value in inputs.items()]
    response = triton.InferenceRequest(model_name=model, requested_output_names=[output], inputs=tensors).exec()
    if response.has_error():
        raise triton.TritonModelException(f"{model}: {response.error().message()}")
    return torch.from_dlpack(triton.get_output_tensor_by_name(response, output).to_dlpack())


class RemoteUnet(Denoiser):
    """The UNet."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        return call("vstar_unet", "eps", full(*inputs)).cpu()


class RemoteVae:
    """The decoder, `chunk` frames at a time."""

    def decoded(self, latents: Tensor, chunk: int) -> Iterator[Tensor]:
        """(1, 4, T, h, w) -> (n, 3, 8h, 8w) each."""
        for part in latents[0].transpose(0, 1).split(chunk):
            yield call("vstar_decoder", "pixels", {"latents": part})


def remote_engine(manifest: Mapping[str, Any], folder: Path) -> Engine:
    """Makes an engine whose three networks are models of this server."""
    identity = manifest["identity"]
    dtype = dtype_named(identity["dtype"])

    def text(tokens: Tensor) -> Tensor:
        return call("vstar_text", "context", {"tokens": tokens}).cpu()

    spec, cpu = model_named(identity["model"]), torch.device("cpu")
    tower: Any = text
    vae: Any = RemoteVae()
    return Engine(
        LoadedModel(spec, tower, RemoteUnet(), vae, cpu, dtype, identity["weights"], artifact=BuiltEngine(folder, manifest))
    )


class TritonPythonModel:
    """Answers STATES and SETTINGS with STEP (done, in all) after each step, and at last with the VIDEO."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        self.engine = remote_engine(json.loads((folder / "engine.json").read_text()), folder)

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.answer(request, sender)
            except Cancelled:
                sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            except (VstarError, ValueError, TypeError, triton.TritonModelException) as error:
                failed = triton.InferenceResponse(error=triton.TritonError(str(error)))
                sender.send(failed, flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request: Any, sender: Any) -> None:
        """Makes one video."""

        def respond(done: int, total: int, video: Tensor, flags: int = 0) -> None:
            step = torch.tensor([done, total], dtype=torch.int32)
            outputs = [triton.Tensor.from_dlpack("STEP", step), triton.Tensor.from_dlpack("VIDEO", video)]
            sender.send(triton.InferenceResponse(output_tensors=outputs), flags=flags)

        def on_step(done: int, total: int) -> None:
            if request.is_cancelled():
                raise Cancelled
            respond(done, total, torch.empty(0, 0, 0, 3, dtype=torch.uint8))

        states = [state.decode() for state in triton.get_input_tensor_by_name(request, "STATES").as_numpy().ravel()]
        given = triton.get_input_tensor_by_name(request, "SETTINGS")
        settings = {} if given is None else json.loads(given.as_numpy().ravel()[0])
        video = self.engine.run(request_of(tuple(states), settings), on_step)
        steps = video.provenance["request"]["sampling"]["steps"]
        respond(steps, steps, torch.from_numpy(video.frames), triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def request_of(states: tuple[str, ...], settings: Mapping[str, Any]) -> Request:
    """Reads SETTINGS, named as `Request`'s fields; `sampling` and `tar` are objects, sigma's levels their keys."""
    given = dict(settings)
    if "sampling" in given:
        given["sampling"] = Sampling(**given["sampling"])
    if given.get("tar") is not None:
        tar = dict(given["tar"])
        sigma = tar.pop("sigma", None)
        if not isinstance(sigma, dict):
            raise ValueError(f'tar needs sigma, an object such as {{"0": 1, "1": 8}}, got {json.dumps(sigma)}')
        given["tar"] = Tar({int(level): value for level, value in sigma.items()}, **tar)
    for name in ("size", "at", "durations", "negatives"):
        if given.get(name) is not None:
            given[name] = tuple(given[name])
    return Request(states, **given)
