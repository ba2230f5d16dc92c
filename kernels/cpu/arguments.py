"""The C++ library's argument structures, as csrc/cpu declares them."""

import ctypes


class Arguments(ctypes.Structure):
    """`struct vstar_attention` of csrc/cpu/temporal_attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "bias")),
        *((name, ctypes.c_int64) for name in ("batch", "frames", "keys", "positions", "heads", "head_dim", "bias_batch")),
        *((name, ctypes.c_int64 * 4) for name in ("q_stride", "k_stride", "v_stride", "out_stride")),
        *((name, ctypes.c_int32) for name in ("dtype", "dense", "isa", "threads")),
    )


class GegluArguments(ctypes.Structure):
    """`struct vstar_geglu_arguments` of csrc/cpu/groupnorm_geglu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inner")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "threads")),
    )


class GroupNormArguments(ctypes.Structure):
    """`struct vstar_groupnorm_silu_arguments` of csrc/cpu/groupnorm_geglu.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("items", "rows", "channels", "groups")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "silu", "isa", "threads")),
    )


class LinearArguments(ctypes.Structure):
    """`struct vstar_linear_arguments` of csrc/cpu/linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "norm_gain", "norm_shift", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "in_features", "out_features")),
        *((name, ctypes.c_int32) for name in ("gate", "isa", "threads")),
        ("eps", ctypes.c_float),
    )


class LinearPairArguments(ctypes.Structure):
    """`struct vstar_linear_pair_arguments` of csrc/cpu/linear.h."""

    _fields_ = (("first", LinearArguments), ("second", LinearArguments))


# in the order in which `vstar_size_of` counts them
CALLS: dict[str, type[ctypes.Structure]] = {
    "vstar_temporal_attention": Arguments,
    "vstar_geglu": GegluArguments,
    "vstar_groupnorm_silu": GroupNormArguments,
    "vstar_linear": LinearArguments,
    "vstar_linear_pair": LinearPairArguments,
}
