"""As much of TensorRT as refitting and running take.

A plan that is refitted is JSON, and an ONNX file whatever bytes stand for its weights. An engine that runs computes in PyTorch
on the addresses that it was given.
"""

import json

import torch

from vstar_engine.kernels.tensorrt.python_plugin import tensor_at


class ILogger:
    ERROR, WARNING = 1, 2


class SerializationFlag:
    EXCLUDE_WEIGHTS, INCLUDE_REFIT = "exclude weights", "include refit"


class Config:
    """Keeps the flags; a plan that is read again was serialised with its weights."""

    def __init__(self):
        self.flags = {SerializationFlag.EXCLUDE_WEIGHTS}

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)


class Engine:
    def __init__(self, held):
        self.held, self.refittable = held, held["refittable"]

    def create_serialization_config(self):
        return Config()

    def serialize_with_config(self, config):
        assert config.flags == {SerializationFlag.INCLUDE_REFIT}
        return json.dumps(self.held).encode()


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        try:
            return Engine(json.loads(bytes(plan)))
        except ValueError:
            self.logger.log(ILogger.ERROR, "the plan's magic tag does not match")
            return None


class Refitter:
    """A plan may state weights that no file has, or that refitting fails."""

    def __init__(self, engine, logger):
        self.engine, self.logger = engine, logger

    def get_missing_weights(self):
        return self.engine.held.get("missing", [])

    def refit_cuda_engine(self):
        self.logger.log(ILogger.ERROR, "out of memory")
        return not self.engine.held.get("fails")


class Said:
    def __init__(self, words):
        self.words = words

    def desc(self):
        return self.words


class OnnxParserRefitter:
    def __init__(self, refitter, logger):
        self.engine, self.num_errors = refitter.engine, 0

    def refit_from_file(self, path):
        with open(path, "rb") as file:
            self.engine.held["weights"] = file.read().hex()
        self.num_errors = int(self.engine.held.get("other shapes", False))
        return not self.num_errors

    def get_error(self, index):
        return Said("conv_in has other shapes")


def computed(latents, timestep, context, fps, tar):
    """What the stand-in network makes of its inputs, each axis of which counts."""
    rows = timestep.float() + context.mean((2, 3)) + fps[:, None] + tar.sum(1)
    return 2 * latents + rows[:, None, :, None, None]


# those of the network's inputs that are no float32
WHOLE = {"timestep": torch.int64, "fps": torch.int64}


class Context:
    """Keeps addresses, shapes and what was current while it was called."""

    def __init__(self, guards):
        self.addresses, self.shapes, self.guards, self.seen = {}, {}, guards, []

    def set_optimization_profile_async(self, index, stream):
        self.seen.append(tuple(self.guards))

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self):
        return 0

    def set_device_memory(self, address, size):
        pass

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        self.seen.append(tuple(self.guards))
        shapes = {**self.shapes, "eps": self.shapes["latents"]}
        tensors = {
            name: tensor_at(self.addresses[name], shape, WHOLE.get(name, torch.float32), torch.device("cpu"))
            for name, shape in shapes.items()
        }
        eps = tensors.pop("eps")
        eps.copy_(computed(**tensors))
        return True


class Running:
    """An engine for 1 to 32 frames whose contexts can be looked at."""

    num_optimization_profiles = 1

    def __init__(self, guards=()):
        self.contexts, self.guards = [], guards

    def get_tensor_profile_shape(self, name, index):
        return [(1, 4, 1, 2, 2), (2, 4, 16, 4, 4), (8, 4, 32, 8, 8)]

    def create_execution_context(self, strategy):
        self.contexts.append(Context(self.guards))
        return self.contexts[-1]
