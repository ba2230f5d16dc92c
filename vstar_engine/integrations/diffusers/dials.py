"""The motion dial: put on a pipeline, reported, and taken off."""

from typing import Any

from vstar_engine.config.sampling import Tar

from .calls import SchedulerOf
from .denoisers import WAN, denoisers
from .report import Report
from .settings import DialSettings
from .unet_dial import UnetDial
from .wan_dial import WanDial


class Dial:
    """A dial that is on; `off()` or the end of a `with` block puts the very processors back that were there."""

    def __init__(self, pipe: Any, settings: DialSettings, scheduler: Any = None):
        if scheduler is None:
            if getattr(pipe, "scheduler", None) is None:
                raise ValueError("a dial needs a scheduler, to know the step: give a pipeline, or scheduler=")
            scheduler = SchedulerOf(pipe)
        self.settings = settings
        found = denoisers(pipe)
        # all are checked before one is touched
        parts = [(WanDial if one.family == WAN else UnetDial)(one, settings, scheduler) for one in found]
        for part in parts:
            part.on()
        self._parts: list[WanDial | UnetDial] = parts

    def _now(self) -> Report:
        reports = [part.report() for part in self._parts]
        lines = tuple(line for lines, _ in reports for line in lines)
        return Report(lines, tuple(sentence for _, left in reports for sentence in left))

    def report(self) -> Report:
        """Returns which layers the dial is on, what computes them, and what it leaves alone and why."""
        return self._now() if self._parts else Report((), ("the dial is off",))

    def off(self) -> None:
        """Takes the dial off; a second call does nothing."""
        for part in self._parts:
            part.off()
        self._parts = []

    def __enter__(self) -> "Dial":
        return self

    def __exit__(self, *raised: object) -> None:
        self.off()


def dial(
    pipe: Any,
    *,
    tar: Tar | None = None,
    reference: float = 1.0,
    decay: float = 1.0,
    trained_frames: int | None = None,
    enhance: float | None = None,
    riflex: int | None = None,
    until: float | str | None = None,
    by: str = "op",
    scheduler: Any = None,
) -> Dial:
    """Puts a motion dial on a diffusers pipeline, or on a denoiser with its `scheduler`.

    The settings are those of `DialSettings`. UNets (`UNet3DConditionModel`, `UNetMotionModel`) take `tar`: VSTAR's rule, arXiv
    2403.13501; both experts of Wan take the others too. Put it on before `torch.compile`.
    Raises ValueError where no layer was found, for classes and processors that are not known, and for compiled or fused
    denoisers and context parallelism.
    """
    settings = DialSettings(tar, reference, decay, trained_frames, enhance, riflex, until, by)
    return Dial(pipe, settings, scheduler)
