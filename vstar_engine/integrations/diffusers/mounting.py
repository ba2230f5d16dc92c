"""Puts processors in the place of a denoiser's own and takes them off again."""

from collections.abc import Callable, Sequence
from typing import Any

from .denoisers import Layer


class Processor:
    """Stands in the place of `inner`, the processor that was there, whose backend setting stays in force."""

    def __init__(self, inner: Any):
        self.inner = inner

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError("context parallelism splits the tokens, and a dial or a timeline is on: take it off first")


class Mounts:
    """The processors that were put on some layers."""

    def __init__(self, layers: Sequence[Layer], make: Callable[[Layer], Processor]):
        self._on = [(layer, layer.module.processor, make(layer)) for layer in layers]
        for layer, _, ours in self._on:
            layer.module.processor = ours

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer, _, _ in self._on]

    def check(self) -> None:
        """Raises RuntimeError where a processor was replaced: the dial would do nothing there, silently."""
        for layer, _, ours in self._on:
            if layer.module.processor is not ours:
                found = type(layer.module.processor).__name__
                raise RuntimeError(f"{layer.path} runs {found} since the dial was put on: set processors first, then the dial")

    def off(self) -> None:
        """Puts the very processors back that were there, but where another was set meanwhile."""
        for layer, inner, ours in self._on:
            if layer.module.processor is ours:
                layer.module.processor = inner
        self._on = []
