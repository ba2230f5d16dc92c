"""The network of StreamingT2V: a UNet whose way up attends to a conditional attention module. arXiv 2403.14773."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vstar_engine.config.models import Spec, StreamingSpec

from .appearance import TEXT_TOKENS
from .blocks import to_clip, to_frames
from .conditional_attention import ConditionalAttention, FeatureFuser
from .denoiser import Denoiser
from .precomputed import ContextKV, TimestepEmbedding, TimestepTable, context_shape
from .unet import UNet


class StreamingUNet(nn.Module, Denoiser):
    """Predicts the noise in a chunk's latents from its text, an anchor's tokens and the last frames of the chunk before.

    A `ChunkDenoiser` calls it in sampling.
    """

    def __init__(self, spec: Spec, spatial_attention: str = "auto"):
        super().__init__()
        self.spec, self.streaming = spec.unet, streaming_of(spec)
        self.base = UNet(spec.unet, spatial_attention)
        plain = replace(spec.unet, image_tokens=0)
        self.cam = ConditionalAttention(plain, self.streaming.pixel_channels, spatial_attention)
        self.fusers = nn.ModuleList(self._fuser(channels) for channels in self.base.skip_channels)
        self.middle_fuser = self._fuser(self.base.skip_channels[-1])

    @property
    def module(self) -> nn.Module:
        return self

    def _fuser(self, channels: int) -> FeatureFuser:
        return FeatureFuser(channels, self.spec.head_dim, self.spec.norm_groups)

    def timestep_table(self, timesteps: Tensor, fps: Tensor) -> TimestepTable:
        """Precomputes timesteps as `UNet.timestep_table` does, for both time embeddings."""
        base, cam = self.base.timestep_table(timesteps, fps), self.cam.timestep_table(timesteps, fps)
        rows = torch.cat([base.rows, cam.rows], dim=-1)
        return TimestepTable(rows, base.blocks + cam.blocks, base.channels + cam.channels)

    def prepare_context(self, *contexts: Tensor) -> ContextKV:
        """Precomputes K and V of contexts (B, 1 or T, 77 + image tokens, C), for both networks.

        The mixers run once for each row given. The conditional attention module attends to the text of its own frames alone.
        """
        return ContextKV(context_shape(contexts), dict(self.project_context(contexts)))

    def project_context(self, contexts: Sequence[Tensor]) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yields every cross-attention with its K and V of the contexts, concatenated."""
        yield from self.base.project_context(contexts)
        yield from self.cam.project_context([self._cam_context(context) for context in contexts])

    def _cam_context(self, context: Tensor) -> Tensor:
        """Returns the part of a context that the conditional attention module attends to."""
        return context[:, : self.streaming.overlap, :TEXT_TOKENS]

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | TimestepEmbedding,
        context: Tensor | ContextKV,
        fps: Tensor,
        tar: Tensor,
        features: Tensor,
    ) -> Tensor:
        """Predicts the noise of a chunk, shaped and typed like `latents`.

        As `UNet.forward`, but that a context's rows have the image tokens behind the 77 text tokens, and that `features`
        (B*overlap, C, H, W) are the pixel encoder's of the known frames. TAR regularises the base UNet alone.
        """
        base, overlap = self.base, self.streaming.overlap
        cam_context = context if isinstance(context, ContextKV) else self._cam_context(context)
        told = timestep if isinstance(timestep, TimestepEmbedding) else timestep[:, :overlap]
        # of the conditional attention module's frames, and zero
        plain = tar.new_zeros(1, tar.shape[1], overlap)
        known, known_middle = self.cam(latents[:, :, :overlap], told, cam_context, fps, plain, features)

        inputs = base.stage_inputs(latents, timestep, context, fps, tar)
        skips = base.encode(base.stem(to_frames(latents), inputs), inputs, base.input_blocks)
        x = base.middle_block(skips[-1], *inputs)
        frames = inputs.frames, overlap
        skips = [fuser(skip, feature, *frames) for fuser, skip, feature in zip(self.fusers, skips, known, strict=True)]
        x = base.decode(self.middle_fuser(x, known_middle, *frames), skips, inputs, base.output_blocks)
        return to_clip(base.out(x), inputs.frames).contiguous()


class ChunkDenoiser(Denoiser):
    """A streaming network with the features of the frames that one chunk continues: the denoiser of that chunk."""

    def __init__(self, network: StreamingUNet, known: Tensor):
        """`known` (B, 3, overlap, H, W) in [-1, 1] are the last frames before the chunk; they are encoded here, once."""
        self.network, self.features = network, network.cam.pixel_encoder(to_frames(known))

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        return self.network(latents, timestep, context, fps, tar, self.features)

    @property
    def module(self) -> nn.Module:
        return self.network

    def prepare_context(self, *contexts: Tensor) -> ContextKV:
        return self.network.prepare_context(*contexts)

    def timestep_table(self, timesteps: Tensor, fps: Tensor) -> TimestepTable:
        return self.network.timestep_table(timesteps, fps)


def streaming_of(spec: Spec) -> StreamingSpec:
    """Returns what a model adds for streaming; ValueError for one that makes a video in one piece."""
    if spec.streaming is None:
        raise ValueError(f"model {spec.name} makes a video in one piece; a streaming model is needed, such as streaming-t2v")
    return spec.streaming
