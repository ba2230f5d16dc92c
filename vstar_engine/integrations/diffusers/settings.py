"""The settings of a dial, checked once, and their JSON form."""

import json
import math
from dataclasses import dataclass
from typing import Any

from vstar_engine.config.checked_values import real, whole
from vstar_engine.config.sampling import Tar, until_step

BY = OP, SEGMENTS = ("op", "segments")


@dataclass(frozen=True)
class DialSettings:
    """What a dial does, and until which share of the steps.

    `tar` is VSTAR's regularisation. `reference` multiplies the weight of the first latent frame's keys for the other frames
    (1 is neutral). `decay` and `trained_frames` are UltraViCo's: the factor of positive logits beyond half the trained
    window (1 is neutral), and that window in latent frames. `enhance` is Enhance-A-Video's weight (None is off). `riflex` is
    RIFLEx's index of a temporal frequency, counted from 1 (None is off). `until` is a share of the steps, such as 0.56 or
    "56%"; without it TAR acts until its `until_step`, and everything else in every step. `by` is what computes a transformer's
    rule: "op" is ours, "segments" is the pipeline's own attention, a call for each value of the table, for `reference` alone.
    Raises ValueError for a value out of range.
    """

    tar: Tar | None = None
    reference: float = 1.0
    decay: float = 1.0
    trained_frames: int | None = None
    enhance: float | None = None
    riflex: int | None = None
    until: float | str | None = None
    by: str = "op"

    def __post_init__(self) -> None:
        for name in ("reference", "decay"):
            value = real(name, getattr(self, name))
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is a finite number from 0 up, and 1 is neutral; got {value}")
            object.__setattr__(self, name, value)
        if self.decay != 1.0 and self.trained_frames is None:
            raise ValueError("decay needs trained_frames, the latent frames that the model was trained on, such as 21 of Wan")
        for name in ("trained_frames", "riflex"):
            if getattr(self, name) is not None and whole(name, getattr(self, name)) < 1:
                raise ValueError(f"{name} is a whole number from 1 up, got {getattr(self, name)}")
        if self.enhance is not None and not math.isfinite(real("enhance", self.enhance)):
            raise ValueError(f"enhance is a finite number, got {self.enhance}")
        if self.until is not None:
            until_step(self._share, 1)
        if self.by not in BY:
            raise ValueError(f"by is one of {', '.join(BY)}, got {self.by!r}")
        if self.by == SEGMENTS and (self.tar is not None or self.decay != 1.0):
            raise ValueError("segments add a constant to pairs of frames, as reference does; tar and decay need by='op'")

    @property
    def _share(self) -> str:
        return self.until if isinstance(self.until, str) else f"{100 * real('until', self.until)!r}%"

    @property
    def on_attention(self) -> bool:
        """Returns whether any setting changes a video transformer's self-attention."""
        return self.tar is not None or self.reference != 1.0 or self.decay != 1.0 or self.enhance is not None

    def last_step(self, steps: int) -> int:
        """Returns the last of `steps` steps, counted from 0, in which the dial acts; -1 where it never does."""
        if self.until is not None:
            return until_step(self._share, steps)
        return self.tar.until_step if self.tar is not None else steps - 1

    def to_json(self) -> str:
        """Returns the settings as one line of JSON."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tar"}
        if self.tar is not None:
            tar = self.tar
            kept["tar"] = {"sigma": dict(tar.sigma), "strength": tar.strength, "until_step": tar.until_step}
        return json.dumps(kept)

    @staticmethod
    def from_json(text: str) -> "DialSettings":
        """Reads what `to_json` writes; raises ValueError for names that are no settings."""
        read = json.loads(text)
        unknown = sorted(set(read) - set(DialSettings.__dataclass_fields__)) if isinstance(read, dict) else [text]
        if unknown:
            raise ValueError(f"a dial's settings are {', '.join(DialSettings.__dataclass_fields__)}; got {', '.join(unknown)}")
        tar = read.pop("tar", None)
        if tar is not None:
            tar = Tar(**{**tar, "sigma": {int(level): sigma for level, sigma in tar["sigma"].items()}})
        return DialSettings(tar=tar, **read)
