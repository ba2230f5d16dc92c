"""A scheduler for diffusers' pipelines: DDIM with the rescale that VideoCrafter2 was trained with."""

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor


class RescaledDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM (arXiv 2010.02502) on noised data x_t = sqrt(a_t) s_t x_0 + sqrt(1 - a_t) e, predicting e.

    s falls from 1 to `scale_end` over the first `scale_steps` timesteps, and stays there; a scale_end of 1 is plain DDIM. The
    timesteps are t, t + 1000 / steps, ... with t = 1.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        scale_end: float = 0.7,
        scale_steps: int = 400,
    ):
        root = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
        self._alpha = torch.cumprod(1 - root**2, 0)
        falling = torch.linspace(1.0, scale_end, scale_steps, dtype=torch.float64)
        self._scale = torch.cat([falling, torch.full((num_train_timesteps,), scale_end, dtype=torch.float64)])
        self.num_inference_steps = num_train_timesteps
        self.timesteps = torch.arange(num_train_timesteps).flip(0)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Sets the timesteps of a run, the noisiest first."""
        trained = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= trained:
            raise ValueError(f"steps must be 1 to {trained}, got {num_inference_steps}")
        self.num_inference_steps = num_inference_steps
        offset = min(1, trained - num_inference_steps)
        self.timesteps = (torch.arange(num_inference_steps) * trained // num_inference_steps + offset).flip(0).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Returns the sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Takes one step; the noise of `eta` is drawn on the generator's device."""
        times = self.timesteps.tolist()
        place = times.index(int(timestep))
        now, before = times[place], times[place + 1] if place + 1 < len(times) else 0
        alpha, alpha_prev = float(self._alpha[now]), float(self._alpha[before])
        clean = (sample - (1 - alpha) ** 0.5 * model_output) / (alpha**0.5 * float(self._scale[now]))
        sigma = eta * ((1 - alpha_prev) / (1 - alpha) * max(1 - alpha / alpha_prev, 0.0)) ** 0.5
        kept = alpha_prev**0.5 * float(self._scale[before])
        after = kept * clean + max(1 - alpha_prev - sigma**2, 0.0) ** 0.5 * model_output
        if sigma > 0:
            on = sample.device if generator is None else generator.device
            noise = torch.randn(sample.shape, generator=generator, device=on, dtype=sample.dtype)
            after = after + sigma * noise.to(sample.device)
        return DDIMSchedulerOutput(prev_sample=after, pred_original_sample=clean) if return_dict else (after, clean)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
