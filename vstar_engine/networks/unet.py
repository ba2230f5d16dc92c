"""The video UNet: spatial residual blocks and transformers, with temporal convolutions and temporal attention.

Hidden states are (B*T, C, H, W). In channels-last memory every reshape here is a view: frames, positions and
channels are then the same bytes read as (B, T, P, C) by the temporal layers. Parameters keep the official names.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vstar_engine.config.models import UNetSpec

from .blocks import ResBlock, SpatialTransformer, Stage, TemporalTransformer, repeat_branches, to_clip, to_frames
from .denoiser import Denoiser
from .layers import CrossAttention, Downsample, Upsample, normed, sinusoid
from .precomputed import CachedFeatures, ContextKV, TimestepEmbedding, TimestepTable, check_rows, context_shape
from .spatial_attention import SPATIAL_ATTENTION

INIT_ATTENTION_HEADS = 8


class StageInputs(NamedTuple):
    """The arguments of every stage, in addition to the hidden states."""

    emb: Tensor | TimestepEmbedding
    context: Tensor | ContextKV
    tar: Tensor
    frames: int


class HalfUNet(nn.Module):
    """The way down of a video UNet: embeddings, stem, input blocks and middle block.

    `spatial_attention` is a key of `SPATIAL_ATTENTION`.
    """

    def __init__(self, spec: UNetSpec, spatial_attention: str = "auto"):
        super().__init__()
        if spatial_attention not in SPATIAL_ATTENTION:
            raise ValueError(f"spatial attention must be one of {', '.join(SPATIAL_ATTENTION)}, got {spatial_attention!r}")
        self.spec, self.spatial_attention = spec, spatial_attention
        width, emb = spec.model_channels, 4 * spec.model_channels
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if spec.fps_condition:
            self.fps_embedding = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if spec.init_attention:
            stem = TemporalTransformer(
                width, INIT_ATTENTION_HEADS, spec.head_dim, spec.transformer_depth, False, spec.norm_groups
            )
            self.init_attn = nn.ModuleList([stem])

        self.input_blocks = nn.ModuleList([Stage(0, nn.Conv2d(spec.in_channels, width, 3, padding=1))])
        channels, self.skip_channels = width, [width]
        for level, mult in enumerate(spec.channel_mult):
            for _ in range(spec.num_res_blocks):
                self.input_blocks.append(Stage(level, *self._layers(level, channels)))
                channels = width * mult
                self.skip_channels.append(channels)
            if level < spec.levels - 1:
                self.input_blocks.append(Stage(level, Downsample(channels)))
                self.skip_channels.append(channels)

        res, transformers = self._res(channels, channels), self._transformers(channels)
        self.middle_block = Stage(spec.levels - 1, res, *transformers, self._res(channels, channels))

    def _res(self, in_channels: int, out_channels: int) -> ResBlock:
        spec = self.spec
        return ResBlock(in_channels, out_channels, 4 * spec.model_channels, spec.temporal_conv, spec.norm_groups)

    def _transformers(self, channels: int) -> list[nn.Module]:
        spec, heads = self.spec, channels // self.spec.head_dim
        return [
            SpatialTransformer(channels, spec, self.spatial_attention),
            TemporalTransformer(channels, heads, spec.head_dim, spec.transformer_depth, spec.use_linear, spec.norm_groups),
        ]

    def _layers(self, level: int, in_channels: int) -> list[nn.Module]:
        """Returns a residual block to the width of a level, and its transformers where it has some."""
        channels = self.spec.model_channels * self.spec.channel_mult[level]
        attends = level in self.spec.attention_levels
        return [self._res(in_channels, channels), *(self._transformers(channels) if attends else ())]

    def embed(self, timestep: Tensor, fps: Tensor) -> Tensor:
        """timestep (B, 1 or T), fps (B,) -> (B, 1 or T, E)."""
        width, dtype = self.spec.model_channels, next(self.input_blocks.parameters()).dtype
        emb = self.time_embed(sinusoid(timestep, width).to(dtype))
        if self.spec.fps_condition:
            emb = emb + self.fps_embedding(sinusoid(fps, width).to(dtype))[:, None]
        return emb

    def timestep_table(self, timesteps: Tensor, fps: Tensor) -> TimestepTable:
        """Precomputes every residual block's projection of timesteps (steps,) or (steps, B) and frame rates (B,)."""
        blocks = tuple(part for part in self.modules() if isinstance(part, ResBlock))
        emb = self.embed(timesteps.reshape(len(timesteps), -1).mT.expand(len(fps), -1), fps)
        table = torch.cat([block.emb_layers(emb) for block in blocks], dim=-1)
        table = table.transpose(0, 1)[:, :, None].contiguous()
        return TimestepTable(table, blocks, tuple(block.channels for block in blocks))

    def prepare_context(self, *contexts: Tensor) -> ContextKV:
        """Precomputes every cross-attention's K and V of contexts (B, 1 or T, L, C); pass the result to `forward` as `context`.

        A context with one row for all frames is projected once, then repeated over the frames that the others have.
        """
        return ContextKV(context_shape(contexts), dict(self.project_context(contexts)))

    def project_context(self, contexts: Sequence[Tensor]) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yields every cross-attention with its K and V of the contexts, concatenated."""
        rows, frames = torch.cat([context.flatten(0, 1) for context in contexts]), context_shape(contexts)[1]
        counts = [context.shape[0] * context.shape[1] for context in contexts]
        for part in self.modules():
            if isinstance(part, CrossAttention):
                kv = part.project(rows)
                if any(context.shape[1] != frames for context in contexts):
                    own = [x.unflatten(0, c.shape[:2]) for x, c in zip(kv.split(counts), contexts, strict=True)]
                    kv = torch.cat([x.expand(-1, frames, -1, -1).flatten(0, 1) for x in own])
                yield part, kv

    def stage_inputs(
        self, latents: Tensor, timestep: Tensor | TimestepEmbedding, context: Tensor | ContextKV, fps: Tensor, tar: Tensor
    ) -> StageInputs:
        """Returns the arguments of every stage for those of `UNet.forward`."""
        rows = context.shape[0]
        check_rows(latents.shape[0], rows)
        emb = timestep if isinstance(timestep, TimestepEmbedding) else self.embed(timestep, fps)
        return StageInputs(emb, context, tar if tar.shape[0] == 1 else repeat_branches(tar, rows), latents.shape[2])

    def encode(self, first: Tensor, inputs: StageInputs, blocks: nn.ModuleList) -> list[Tensor]:
        """Runs input blocks, less the stem, on its output; returns the output of each, for the skip connections."""
        skips = [first]
        for stage in blocks[1:]:
            skips.append(stage(skips[-1], *inputs))
        return skips

    def stem(self, x: Tensor, inputs: StageInputs) -> Tensor:
        """Runs the first input block and its temporal attention, which is never regularised."""
        x = self.input_blocks[0](x, *inputs)
        if self.spec.init_attention:
            x = to_frames(self.init_attn[0](to_clip(x, inputs.frames), inputs.tar.new_zeros(1, inputs.frames)))
        return x


class UNet(HalfUNet, Denoiser):
    """Predicts the noise in a video's latents; `spatial_attention` is a key of `SPATIAL_ATTENTION`."""

    def __init__(self, spec: UNetSpec, spatial_attention: str = "auto"):
        super().__init__(spec, spatial_attention)
        width, skips = spec.model_channels, [*self.skip_channels]
        channels = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(spec.channel_mult))):
            for i in range(spec.num_res_blocks + 1):
                layers = self._layers(level, channels + skips.pop())
                channels = width * mult
                if level and i == spec.num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Stage(level, *layers))

        self.out = normed(spec.norm_groups, width, nn.Conv2d(width, spec.out_channels, 3, padding=1))

    @property
    def module(self) -> nn.Module:
        return self

    def predict_cached(self, given: tuple[Any, ...], cached: CachedFeatures) -> Tensor:
        return self(*given, cached)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimestepEmbedding,
        context: Tensor | ContextKV,
        fps: Tensor,
        tar: Tensor,
        cached: CachedFeatures | None = None,
    ) -> Tensor:
        """Predicts the noise, shaped and typed like `latents`.

        latents (B, C, T, H, W), H and W multiples of 2**(levels-1); timestep (B, 1 or T); context (B, 1 or T, L, context_dim);
        fps (B,); tar (1 or B, levels, T) float32, row = g of that level (zeros: plain), or dense (1 or B, levels, T, T).
        With a context of (kB, ...) each video has k texts: the first of every video, then the second of every video, and so on;
        the result is (kB, C, T, H, W). What comes before the first cross-attention is computed once for all k. `context` may be
        what `prepare_context` returns, and `timestep` the embedding of a row of the `timestep_table`, which knows the fps.
        `cached` without features is filled; with features, the blocks that made them are skipped.
        """
        inputs = self.stage_inputs(latents, timestep, context, fps, tar)
        x = self.stem(to_frames(latents), inputs)
        if cached is None:
            skips = self.encode(x, inputs, self.input_blocks)
            x = self.middle_block(skips[-1], *inputs)
            x = self.decode(x, skips, inputs, self.output_blocks)
        else:
            x = self.around(cached, x, inputs)
        return to_clip(self.out(x), inputs.frames).contiguous()

    def decode(self, x: Tensor, skips: list[Tensor], inputs: StageInputs, blocks: nn.ModuleList) -> Tensor:
        """Runs output blocks, each on the last remaining skip connection, repeated where branches shared it."""
        for stage in blocks:
            x = stage(torch.cat([x, repeat_branches(skips.pop(), x.shape[0], pixels=True)], dim=1), *inputs)
        return x

    def around(self, cached: CachedFeatures, first: Tensor, inputs: StageInputs) -> Tensor:
        """Runs the last `cached.stages` output blocks on cached features, with the input blocks whose skips they read.

        Without features, runs all blocks and stores the features.
        """
        inner = len(self.output_blocks) - cached.stages
        if cached.features is None:
            skips = self.encode(first, inputs, self.input_blocks)
            x = self.middle_block(skips[-1], *inputs)
            cached.features = self.decode(x, skips, inputs, self.output_blocks[:inner])
        else:
            skips = self.encode(first, inputs, self.input_blocks[: len(self.input_blocks) - inner])
        return self.decode(cached.features, skips, inputs, self.output_blocks[inner:])
