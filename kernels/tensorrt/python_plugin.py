"""Temporal attention as a TensorRT plugin in Python, whose enqueue launches the Triton kernel on TensorRT's own stream.

The route for TensorRT for RTX, which takes no quickly deployable plugin, where there is no compiler for the C++ one. The
process that runs the engine must register it too.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from vstar_engine.kernels.gpu.temporal_attention import temporal_attention_triton
from vstar_engine.kernels.source_hash import kernel_hash

from .names import NAME, NAMESPACE, VERSION

# how TensorRT's DataType calls them
DTYPES = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32}


class _Memory:
    """Device memory at an address, as bytes."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the contiguous tensor that lies at an address, without copying it; it does not own the memory."""
    size = dtype.itemsize
    for axis in shape:
        size *= axis
    if device.type == "cuda":
        memory = torch.as_tensor(_Memory(address, size), device=device)
    else:
        memory = torch.frombuffer((ctypes.c_byte * size).from_address(address), dtype=torch.uint8)
    return memory.view(dtype).view(shape)


def attend(inputs: list[Tensor], out: Tensor, stream: int) -> None:
    """Runs the kernel from q, k, v, g into `out` on a CUDA stream given by its handle."""
    q, k, v, g = inputs
    if not out.is_cuda:
        temporal_attention_triton(q, k, v, g, out=out)
        return
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=out.device)):
        temporal_attention_triton(q, k, v, g, out=out)


def classes(trt: Any) -> tuple[type, type]:
    """Returns the plugin's class and its creator's, derived from the library's own."""

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
        def __init__(self) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.num_outputs = 1
            self.timing_cache_id = kernel_hash()

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin()

        def get_output_data_types(self, input_types: list[Any]) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: list[Any], shape_inputs: list[Any], expr_builder: Any) -> list[Any]:
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, pos: int, in_out: list[Any], num_inputs: int) -> bool:
            here, kind = in_out[pos].desc, in_out[0].desc.type
            wanted = trt.DataType.FLOAT if pos == 3 else kind
            return kind.name in DTYPES and here.type == wanted and here.format == trt.TensorFormat.LINEAR

        def configure_plugin(self, inputs: list[Any], outputs: list[Any]) -> None:
            pass

        def get_valid_tactics(self) -> list[int]:
            return [1]

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: list[Any], outputs: list[Any]) -> None:
            pass

        def attach_to_context(self, resource_context: Any) -> Any:
            return Plugin()

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def enqueue(
            self,
            input_desc: list[Any],
            output_desc: list[Any],
            inputs: list[int],
            outputs: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
            tensors = [
                tensor_at(address, tuple(described.dims), DTYPES[described.type.name], device)
                for address, described in zip([*inputs, *outputs], [*input_desc, *output_desc], strict=True)
            ]
            attend(tensors[:4], tensors[4], stream)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, NAMESPACE
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
            return Plugin()

    return Plugin, Creator
