"""The denoiser protocol: predicts noise and takes sampling steps, whichever back end runs the network."""

from typing import Any

import torch
from torch import Tensor, nn

from vstar_engine.kernels.guided_step import guided_step

from .precomputed import CachedFeatures, ContextKV, TimestepTable, context_shape
from .step import SamplingStep, StepInputs


def update(inputs: StepInputs, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the next latents and the predicted clean latents for the predictions of a step's calls, concatenated."""
    return guided_step(inputs.latents, predicted, inputs.plain, inputs.coefficients, inputs.noise, inputs.history)


class Denoiser:
    """Predicts noise and takes sampling steps. The defaults suit a network that keeps nothing between two calls."""

    # whether a shape's first steps take longer, because they are recorded
    records_steps = False

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor, fps: Tensor, tar: Tensor) -> Tensor:
        """Predicts the noise (kB, 4, T, H, W).

        latents (B, 4, T, H, W), timestep (B, 1 or T), context (kB, 1 or T, L, C), fps (B,), tar (1 or B, levels, T). Each video
        has k texts: the first of every video, then the second of every video, and so on. The result is the caller's own.
        Every back end defines it.
        """
        raise NotImplementedError

    @property
    def module(self) -> nn.Module | None:
        """Returns the network whose weights may be replaced; None where they are part of a built engine."""
        return None

    def prepare_context(self, *contexts: Tensor) -> ContextKV | Tensor:
        """Concatenates contexts (B, 1 or T, L, C) and returns them in the form that a call takes, for use in every step."""
        frames = context_shape(contexts)[1]
        return torch.cat([context.expand(-1, frames, -1, -1) for context in contexts])

    def timestep_table(self, timesteps: Tensor, fps: Tensor) -> TimestepTable:
        """Returns the timestep argument of every step: `timesteps` (steps,) or (steps, B) for frame rates `fps` (B,)."""
        return TimestepTable(timesteps.reshape(len(timesteps), -1, 1).expand(-1, len(fps), -1))

    def predict_cached(self, given: tuple[Any, ...], cached: CachedFeatures) -> Tensor:
        """Predicts the noise for the arguments `given` of a call, reusing `cached` features, or storing them if it has none.

        Raises ValueError for a network that cannot run in parts.
        """
        raise ValueError("this network only runs whole: step caching needs eager PyTorch")

    def run_step(self, step: SamplingStep) -> tuple[Tensor, ...]:
        """Takes one sampling step: network calls, guidance and update. The caller owns the results.

        Returns the next latents, the predicted clean latents, and the features of each call that stores them.
        """
        latents, eps, kept = step.inputs.latents.to(step.dtype), [], []
        for call in step.calls:
            x, timestep_embedding, fps, tar = (call.of(value) for value in (latents, *step.inputs[1:4]))
            given: tuple[Any, ...] = (
                x,
                step.timesteps.embedding(timestep_embedding),
                call.conditioning.prepared(self.prepare_context),
                fps,
                tar,
            )
            if call.cached is None:
                eps.append(self(*given))
                continue
            cached = CachedFeatures(call.cached.stages, call.cached.features)
            eps.append(self.predict_cached(given, cached))
            if call.cached.features is None:
                assert cached.features is not None
                kept.append(cached.features)
        predicted = torch.cat(eps) if len(eps) > 1 else eps[0]
        return *update(step.inputs, predicted), *kept

    def graph_bytes(self) -> int:
        """Returns the bytes reserved for the CUDA graphs of its steps, which nothing else can use."""
        return 0

    def forget_graphs(self) -> bool:
        """Drops the CUDA graphs of its steps and frees their memory; returns whether there were any."""
        return False
