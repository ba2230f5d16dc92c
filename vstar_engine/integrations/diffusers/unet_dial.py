"""VSTAR's regularisation (TAR) on the temporal attentions of diffusers' UNets, level by level."""

from typing import Any

from torch import Tensor

from vstar_engine.kernels.temporal_attention import MAX_HEAD_DIM, temporal_attention, temporal_attention_ref
from vstar_engine.sampling.tar import toeplitz

from .calls import Call, Calls
from .denoisers import MOTION, Denoiser, check_layer, temporal_layers
from .mounting import Mounts, Processor
from .positions import StretchedPositions
from .report import LayerReport, backend_of
from .settings import DialSettings


class RegularisedAttention(Processor):
    """Temporal self-attention with TAR's row of one level; without a row it calls the processor that was there."""

    def __init__(self, inner: Any, level: int, rows: dict[int, Tensor]):
        super().__init__(inner)
        self.level, self.rows = level, rows

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        row = self.rows.get(self.level)
        if row is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        if encoder_hidden_states is not None:
            raise ValueError("a temporal attention was given a text, and the dial knows self-attention between frames alone")
        q, k, v = (to(hidden_states) for to in (attn.to_q, attn.to_k, attn.to_v))
        # (positions, frames, channels) -> (1, frames, positions, heads, head_dim)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(0, 1)[None] for x in (q, k, v))
        attend = temporal_attention if q.shape[-1] <= MAX_HEAD_DIM else temporal_attention_ref
        out = attend(q, k, v, row)[0].transpose(0, 1).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class UnetDial:
    """A dial on one UNet. Raises ValueError where a layer cannot carry it, or a level has none."""

    def __init__(self, denoiser: Denoiser, settings: DialSettings, scheduler: Any):
        others = (
            settings.reference != 1.0 or settings.decay != 1.0 or settings.enhance is not None or settings.riflex is not None
        )
        if settings.tar is None or others:
            raise ValueError(
                f"the dial of a {denoiser.family} is tar=; reference, decay, enhance and riflex are for transformers"
            )
        self.denoiser, self.settings, self.tar = denoiser, settings, settings.tar
        self.tar.check_levels(denoiser.levels)
        if any(type(part).__name__ == "FreeNoiseTransformerBlock" for part in denoiser.module.modules()):
            raise ValueError(
                f"{denoiser.name} attends in FreeNoise's windows, not over the whole clip: disable_free_noise() first"
            )
        layers = [layer for layer in temporal_layers(denoiser) if layer.level in self.tar.sigma]
        empty = sorted(set(self.tar.sigma) - {layer.level for layer in layers})
        if empty or not layers:
            raise ValueError(f"{denoiser.name} has no temporal attention at level {', '.join(map(str, empty)) or 'any'}")
        for layer in layers:
            check_layer(layer, denoiser)
        self._layers, self._scheduler = layers, scheduler
        self._rows: dict[int, Tensor] = {}
        self._tables: dict[int, Tensor] = {}
        self._positions: list[StretchedPositions] = []

    def on(self) -> None:
        """Puts the processors on."""
        rows = self._rows
        self._mounts = Mounts(self._layers, lambda layer: RegularisedAttention(layer.module.processor, layer.level or 0, rows))
        self._calls = Calls(self.denoiser, self._scheduler, self._before)
        if self.denoiser.family == MOTION:
            self._positions = StretchedPositions.on(self.denoiser)

    def off(self) -> None:
        """Puts everything back that was there."""
        self._calls.off()
        self._mounts.off()
        for positions in self._positions:
            positions.off()
        self._positions = []

    def _before(self, call: Call, text: Tensor) -> None:
        self._mounts.check()
        known = next(iter(self._tables.values()), None)
        if known is None or known.shape[-1] != call.frames or known.device != call.device:
            tar = self.tar
            self._tables = {
                level: toeplitz(call.frames, sigma, tar.strength)[None].to(call.device) for level, sigma in tar.sigma.items()
            }
        self._rows.clear()
        if call.step <= self.settings.last_step(call.steps) and self.tar.strength != 0.0:
            self._rows.update(self._tables)

    def report(self) -> tuple[list[LayerReport], list[str]]:
        """Returns a line for each layer, and what the dial leaves alone and why."""
        lines = []
        for layer in self._layers:
            head_dim = layer.module.to_q.out_features // layer.module.heads
            backend = backend_of(next(layer.module.parameters())) if head_dim <= MAX_HEAD_DIM else "PyTorch (wide heads)"
            sigma = self.tar.sigma[layer.level or 0]
            lines.append(LayerReport(self.denoiser.name, layer.path, f"TAR, level {layer.level}, sigma {sigma:g}", backend))
        left = [f"{self.denoiser.name}: levels without a sigma are left as they are"]
        if hasattr(self.denoiser.module, "transformer_in"):
            left.append(f"{self.denoiser.name}.transformer_in: the stem is never regularised")
        if self._positions:
            most = self._positions[0].frames
            left.append(f"{self.denoiser.name}: the position table of {most} frames is stretched over clips that have more")
        return lines, left
