"""A guider for diffusers' modular pipelines: classifier-free guidance with a dial on, which gets the step from its loop."""

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance

from .dials import Dial
from .settings import DialSettings


class DialGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose denoiser is called with a dial on; `dial` is `DialSettings.to_json()`.

    The processors are put on for each call of the denoiser and taken off behind it, so a compiled denoiser is refused. The
    configuration is saved and loaded as any guider's. Raises ValueError for settings that a dial does not take.
    """

    @register_to_config
    def __init__(
        self,
        dial: str = "{}",
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        self.settings = DialSettings.from_json(dial)
        self._on: Dial | None = None

    def prepare_models(self, denoiser: Any) -> None:
        """Puts the dial on the denoiser."""
        super().prepare_models(denoiser)
        self.cleanup_models(denoiser)
        self._on = Dial(denoiser, self.settings, lambda timestep: (self._step, self._num_inference_steps))

    def cleanup_models(self, denoiser: Any) -> None:
        """Takes the dial off again."""
        if self._on is not None:
            self._on.off()
            self._on = None
