"""Dials on the self-attentions of Wan 2.1 and 2.2, both experts: tables of frame pairs, Enhance-A-Video, RIFLEx."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vstar_engine.kernels.frame_attention import frame_attention
from vstar_engine.kernels.problems import FrameTables

from .calls import Call, Calls
from .denoisers import Denoiser, check_layer, frame_layers
from .enhance import enhancement
from .mounting import Mounts, Processor
from .report import LayerReport, frame_backend_of
from .rotary import Riflex, period, rotate
from .segments import Segment, attend_by, by_segments, segments_of
from .settings import SEGMENTS, DialSettings
from .tables import frame_tables


@dataclass
class Rule:
    """What is in force in a call: tables of frame pairs, what computes them, Enhance-A-Video's weight, tokens a frame."""

    tables: FrameTables | None = None
    enhance: float | None = None
    tokens: int = 1
    segments: list[Segment] | None = None


class FrameAttention(Processor):
    """Wan's self-attention by a rule; without one it calls the processor that was there."""

    def __init__(self, inner: Any, rule: Rule):
        super().__init__(inner)
        self.rule = rule

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        tables, enhance, tokens = self.rule.tables, self.rule.enhance, self.rule.tokens
        if tables is None and enhance is None:
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        if attention_mask is not None or rotary_emb is None:
            raise ValueError("the dial knows Wan's self-attention with rotary positions and without a mask")
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        q, k = rotate(q, rotary_emb), rotate(k, rotary_emb)
        if tables is not None and self.rule.segments is not None:
            out = by_segments(q, k, v, self.rule.segments, attend_by(self.inner))
        else:
            out = frame_attention(q, k, v, tables or FrameTables(), tokens)
        if enhance is not None:
            out = (out * enhancement(q, k, tokens, enhance)).type_as(out)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


class WanDial:
    """A dial on one Wan transformer. Raises ValueError where a layer cannot carry it."""

    def __init__(self, denoiser: Denoiser, settings: DialSettings, scheduler: Any):
        self.denoiser, self.settings, self._scheduler = denoiser, settings, scheduler
        if settings.tar is not None and set(settings.tar.sigma) != {0}:
            raise ValueError(f"a transformer has one level: give tar=Tar({{0: sigma}}), got {dict(settings.tar.sigma)}")
        self._layers = list(frame_layers(denoiser))
        if not self._layers:
            raise ValueError(f"{denoiser.name} has no self-attention at blocks.*.attn1")
        for layer in self._layers:
            check_layer(layer, denoiser)
        rope: Any = denoiser.module.rope
        if settings.riflex is not None and settings.riflex > rope.t_dim // 2:
            raise ValueError(f"riflex is a temporal frequency, 1 to {rope.t_dim // 2} here, got {settings.riflex}")
        self._rope, self._rule = rope, Rule()
        self._riflex: Riflex | None = None
        self._known: tuple[Any, FrameTables | None] = (None, None)

    def on(self) -> None:
        """Puts the processors and hooks on."""
        self._mounts = Mounts(self._layers, lambda layer: FrameAttention(layer.module.processor, self._rule))
        self._calls = Calls(self.denoiser, self._scheduler, self._before)
        if self.settings.riflex is not None:
            self._riflex = Riflex(self._rope, self.settings.riflex)

    def off(self) -> None:
        """Puts everything back that was there."""
        self._calls.off()
        self._mounts.off()
        if self._riflex is not None:
            self._riflex.off()
            self._riflex = None

    def _before(self, call: Call, text: Tensor) -> None:
        self._mounts.check()
        active = call.step <= self.settings.last_step(call.steps)
        shape = call.frames, call.tokens, call.device
        if self._known[0] != shape:
            tables = frame_tables(self.settings, call.frames, call.tokens, call.device)
            self._known = shape, tables
            if self.settings.by == SEGMENTS and tables is not None and tables.b is not None:
                self._rule.segments = segments_of(tables.b, call.tokens)
        self._rule.tables = self._known[1] if active else None
        self._rule.enhance = self.settings.enhance if active else None
        self._rule.tokens = call.tokens
        if self._riflex is not None:
            self._riflex.active = active

    def report(self) -> tuple[list[LayerReport], list[str]]:
        """Returns a line for each layer, and what is left alone and why."""
        settings, left = self.settings, []
        rules = []
        if settings.reference != 1.0:
            rules.append(f"first frame's keys x {settings.reference:g} (ours; no published method)")
        if settings.decay != 1.0:
            rules.append(f"UltraViCo, {settings.decay:g} beyond half of {settings.trained_frames} latent frames")
        if settings.tar is not None:
            rules.append(f"TAR, sigma {settings.tar.sigma[0]:g} latent frames (an experiment)")
        if settings.enhance is not None:
            rules.append(f"Enhance-A-Video, weight {settings.enhance:g}")
        if settings.riflex is not None:
            reach = period(settings.riflex, self._rope.t_dim)
            left.append(f"{self.denoiser.name}.rope: RIFLEx lowers frequency {settings.riflex} past {reach:.0f} latent frames")
        if not rules:
            return [], [*left, f"{self.denoiser.name}: neutral settings, the processors that were there are called"]
        backend = "the pipeline's attention by segments of key frames"
        if settings.by != SEGMENTS:
            backend = frame_backend_of(next(self.denoiser.module.parameters()))
        return [LayerReport(self.denoiser.name, layer.path, ", ".join(rules), backend) for layer in self._layers], left
