"""Clips as factors: what a landscape video shows in every frame, drawn from a seed, and the words for it.

Season and time of day are circles of length 4. Season: 0 winter, 1 spring, 2 summer, 3 autumn.
Day: 0 dawn, 1 day, 2 dusk, 3 night.
"""

from dataclasses import dataclass

import numpy as np

FRAMES = 16
DAYS = ("dawn", "day", "dusk", "night")
WEATHERS = ("clear", "rain", "snow")
OBJECTS = ("none", "house", "boat", "car", "ball", "balloon")
COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "yellow": (0.98, 0.85, 0.10),
    "green": (0.05, 0.60, 0.25),
    "blue": (0.10, 0.25, 0.90),
    "purple": (0.55, 0.15, 0.75),
    "white": (0.97, 0.97, 0.97),
}
MOTIONS = {"left": -1.0, "still": 0.0, "right": 1.0}

# named seasons: position on the circle
SEASONS = {
    "winter": 0.0,
    "thaw": 0.45,
    "early spring": 0.75,
    "blossom": 1.05,
    "full spring": 1.5,
    "summer": 2.0,
    "late summer": 2.5,
    "autumn": 3.0,
    "late autumn": 3.5,
}


@dataclass(frozen=True)
class Clip:
    """The true factors of every frame; arrays have one entry per frame.

    `layout` seeds what stays the same in a clip: hills, trees, where the object starts.
    `weather_amount` is 0 to 1; `colour` is RGB from 0 to 1; `drift` is the camera's shift in pixels, `travel` the object's.
    """

    layout: int
    season: np.ndarray
    day: np.ndarray
    weather: str
    weather_amount: np.ndarray
    object: str
    colour_names: tuple[str, str]
    colour: np.ndarray
    drift: np.ndarray
    travel: np.ndarray
    motion: str
    camera: str

    @property
    def frames(self) -> int:
        return len(self.season)


def ramp(rng: np.random.Generator, frames: int, low: float, high: float) -> np.ndarray:
    """Goes from `low` to `high` with the change starting and ending inside the clip."""
    start = rng.uniform(0.0, 0.2)
    stop = rng.uniform(0.8, 1.0)
    along = np.linspace(0.0, 1.0, frames)
    return low + (high - low) * np.clip((along - start) / (stop - start), 0.0, 1.0)


def sample(seed: int, frames: int = FRAMES) -> Clip:
    """Draws one clip: seven in ten keep one state and move gently, the rest change one factor slowly."""
    rng = np.random.default_rng(seed)
    change = rng.choice(["none", "season", "day", "colour", "weather"], p=[0.7, 0.12, 0.09, 0.05, 0.04])
    season = rng.choice(list(SEASONS.values())) + rng.normal(0.0, 0.06)
    day = rng.choice(4, p=[0.14, 0.46, 0.17, 0.23]) + rng.normal(0.0, 0.06)
    cold = SEASONS["winter"] - 0.6 < (season + 1) % 4 - 1 < SEASONS["thaw"] + 0.1
    weather = rng.choice(WEATHERS, p=[0.68, 0.08, 0.24] if cold else [0.8, 0.2, 0.0])
    thing = rng.choice(OBJECTS, p=[0.25] + [0.15] * 5)
    first, last = rng.choice(list(COLOURS), 2, replace=False)
    motion = "still" if thing in ("none", "house") else str(rng.choice(list(MOTIONS)))
    camera = str(rng.choice(list(MOTIONS), p=[0.2, 0.6, 0.2]))
    along = np.arange(frames) / FRAMES
    still = np.zeros(frames)
    fade = ramp(rng, frames, 0.0, 1.0) if change == "colour" else still
    if weather == "clear":
        amount = still
    else:
        amount = ramp(rng, frames, *rng.permutation([0.0, 1.0])) if change == "weather" else still + rng.uniform(0.8, 1.0)
    return Clip(
        layout=int(rng.integers(2**31)),
        season=season + (ramp(rng, frames, -0.5, 0.5) * rng.uniform(0.4, 1.0) if change == "season" else still),
        day=day + (ramp(rng, frames, -0.5, 0.5) * rng.uniform(0.4, 1.0) if change == "day" else still),
        weather=str(weather),
        weather_amount=amount,
        object=str(thing),
        colour_names=(str(first), str(last if change == "colour" else first)),
        colour=np.outer(1 - fade, COLOURS[first]) + np.outer(fade, COLOURS[last]),
        drift=along * MOTIONS[camera] * rng.uniform(4.0, 10.0),
        travel=along * MOTIONS[motion] * rng.uniform(12.0, 26.0),
        motion=motion,
        camera=camera,
    )
