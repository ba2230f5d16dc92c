"""A stand-in for the module that Triton gives its Python back end: requests to other models run in ONNX Runtime here."""

from functools import cache

import numpy as np
import onnxruntime
import torch

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
REPOSITORY = None  # the folder that models are taken from


@cache
def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


class TritonError(Exception):
    def message(self):
        return str(self)


class TritonModelException(Exception):
    pass


class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values

    @staticmethod
    def from_dlpack(name, tensor):
        return Tensor(name, torch.from_dlpack(tensor).numpy())

    def to_dlpack(self):
        return torch.from_numpy(self.values).__dlpack__()

    def as_numpy(self):
        return self.values


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.outputs, self.failure = output_tensors, error

    def has_error(self):
        return self.failure is not None

    def error(self):
        return self.failure


class InferenceRequest:
    def __init__(self, model_name, requested_output_names, inputs):
        self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

    def exec(self):
        (path,) = (REPOSITORY / self.model / "1").glob("*.onnx")
        try:
            out = session(path).run(self.wanted, {tensor.name: tensor.values for tensor in self.inputs})
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            return InferenceResponse(error=TritonError(str(error)))
        return InferenceResponse([Tensor(name, values) for name, values in zip(self.wanted, out, strict=True)])


def get_output_tensor_by_name(response, name):
    return next(tensor for tensor in response.outputs if tensor.name == name)


class Client:
    """A request as the server hands it over, which is also where the responses go."""

    def __init__(self, states, settings=None, patience=None):
        self.tensors = {"STATES": np.array([state.encode() for state in states], dtype=object)}
        if settings is not None:
            self.tensors["SETTINGS"] = np.array([settings.encode()], dtype=object)
        self.patience, self.received, self.finals = patience, [], 0

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        return self.patience is not None and len(self.received) >= self.patience

    def send(self, response=None, flags=0):
        self.finals += flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if response is not None:
            self.received.append(response)


def get_input_tensor_by_name(request, name):
    return Tensor(name, request.tensors[name]) if name in request.tensors else None
