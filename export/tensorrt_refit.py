"""Swaps the weights inside a built TensorRT plan for those of an ONNX file of the same graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vstar_engine.backends.tensorrt_library import make_logger
from vstar_engine.errors import EngineError


def refit_plan(trt: Any, plan: Path, onnx: Path, out: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Writes `plan` with the weights of `onnx` to `out`; returns facts for a manifest.

    TensorRT's own parser maps the file's tensors to those of the engine, which may be folded or laid out anew. Raises
    EngineError for a plan that was not built for it, or where weights are missing.
    """
    logger = make_logger(trt, report)
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot load {plan}: {'; '.join(logger.errors[:2])}")
    if not engine.refittable:
        raise EngineError(f"{plan} was not built for other weights; build it with --refit yes")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    report(f"reading the weights of {onnx.name}")
    if not parser.refit_from_file(str(onnx)):
        said = [parser.get_error(index).desc() for index in range(parser.num_errors)] or logger.errors
        raise EngineError(f"the weights do not fit {plan}: {'; '.join(said[:3])}")
    missing = refitter.get_missing_weights()
    if missing:
        raise EngineError(f"{len(missing)} weights of {plan} are in no file: {', '.join(missing[:5])}")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"TensorRT cannot refit {plan}: {'; '.join(logger.errors[:2])}")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if hasattr(trt.SerializationFlag, "INCLUDE_REFIT"):
        # since 10.15; before, a plan that is refitted can be refitted again anyway
        config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    out.write_bytes(engine.serialize_with_config(config))
    return {"bytes": out.stat().st_size, "refitted": True}
