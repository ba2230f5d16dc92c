"""Which entries of the launch table a command line selects."""

from collections.abc import Iterable

from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES


def numbers(text: str) -> list[int]:
    """Reads numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Reads words separated by commas."""
    return text.split(",")


def check(archs: Iterable[int], dtypes: Iterable[str]) -> None:
    """Raises ValueError for an architecture or a dtype that the launch table does not have."""
    unknown = [*(set(archs) - set(ARCHITECTURES)), *(set(dtypes) - set(DTYPES))]
    if unknown:
        raise ValueError(f"unknown {unknown}; architectures are {ARCHITECTURES}, dtypes {tuple(DTYPES)}")
