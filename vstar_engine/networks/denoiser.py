"""What predicts the noise, whichever back end runs it."""

from collections.abc import Callable

from torch import Tensor

# (latents (B, 4, T, H, W), timestep (B, 1 or T), context (kB, 1 or T, 77, C), fps (B,), tar (1 or B, levels, T)) -> noise
# (kB, 4, T, H, W): each video hears k texts, all videos the first, then all the next
Denoiser = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
