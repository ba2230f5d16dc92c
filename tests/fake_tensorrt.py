"""As much of TensorRT as refitting takes: a plan is JSON, and an ONNX file whatever bytes stand for its weights."""

import json


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
