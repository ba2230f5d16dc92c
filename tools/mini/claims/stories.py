"""Twenty stories to judge the mini model by: one prompt, the states it passes through, and each state's true factors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tools.mini.data.captions import DAY_WORDS, SEASON_WORDS, WEATHER_WORDS, hats, one
from tools.mini.data.scenes import COLOURS, DAYS, MOTIONS, OBJECTS, SEASONS, WEATHERS, Clip
from vstar_engine.config.timeline import anchor_frames

Shares = dict[str, np.ndarray]
TABLES: dict[str, Callable[[str], np.ndarray]] = {
    "season": lambda name: hats(SEASONS[name], list(SEASONS.values())),
    "day": lambda name: one(DAYS, name),
    "weather": lambda name: one(WEATHERS, name),
    "object": lambda name: one(OBJECTS, name),
    "colour": lambda name: one(list(COLOURS), name),
}


@dataclass(frozen=True)
class State:
    """What one state says: `words`, and the named factors of them: those that change in the story, and those `kept`."""

    words: str
    factors: dict[str, str]
    kept: dict[str, str] = field(default_factory=dict)

    def shares(self) -> Shares:
        """Returns the factors that change, in shares, as the probe reads them."""
        return {factor: TABLES[factor](name) for factor, name in self.factors.items()}

    def kept_shares(self) -> Shares:
        """Returns the factors that every state of the story says alike."""
        return {factor: TABLES[factor](name) for factor, name in self.kept.items()}


@dataclass(frozen=True)
class Story:
    prompt: str
    states: tuple[State, ...]
    thing: str = "none"
    colour: str = "white"
    season: str = "summer"

    @property
    def texts(self) -> list[str]:
        return [state.words for state in self.states]

    def clip(self, frames: int, seed: int) -> Clip:
        """Returns the story as the renderer would tell it, its states spread over the frames as the engine spreads them."""
        rng = np.random.default_rng(seed)
        at = np.arange(frames)
        where = anchor_frames(len(self.states), frames)

        def path(factor: str, table: dict[str, float], usual: str) -> np.ndarray:
            values = np.array([table[state.factors.get(factor, usual)] for state in self.states])
            return np.interp(at, where, np.unwrap(values, period=4.0))

        names = [state.factors.get("colour", self.colour) for state in self.states]
        weather = [state.factors.get("weather", "clear") for state in self.states]
        motion = "still" if self.thing in ("none", "house") else "right"
        return Clip(
            layout=int(rng.integers(2**31)),
            season=path("season", SEASONS, self.season),
            day=path("day", {name: float(i) for i, name in enumerate(DAYS)}, "day"),
            weather=next((name for name in weather if name != "clear"), "clear"),
            weather_amount=np.interp(at, where, [float(name != "clear") for name in weather]),
            object=self.thing,
            colour_names=(names[0], names[-1]),
            colour=np.stack([np.interp(at, where, [COLOURS[name][c] for name in names]) for c in range(3)], 1),
            drift=np.zeros(frames),
            travel=np.linspace(0.0, 1.0, frames) * MOTIONS[motion] * 24.0,
            motion=motion,
            camera="still",
        )


def with_thing(thing: str, colour: str) -> tuple[str, dict[str, str]]:
    """Returns the words and the factors of an object that stays; none of either without one."""
    return (f", a {colour} {thing}", {"object": thing, "colour": colour}) if thing != "none" else ("", {})


def seasons(prompt: str, *names: str, thing: str = "none", colour: str = "white") -> Story:
    tail, kept = with_thing(thing, colour)
    told = [State(SEASON_WORDS[name][0] + tail, {"season": name}, kept) for name in names]
    return Story(prompt + tail, tuple(told), thing, colour)


def days(*names: str, season: str = "summer", thing: str = "none", colour: str = "white") -> Story:
    tail, kept = with_thing(thing, colour)
    kept = {"season": season} | kept
    told = [State(f"{SEASON_WORDS[season][1]} {DAY_WORDS[n][0]}{tail}", {"day": n}, kept) for n in names]
    prompt = f"a landscape transitioning from {names[0]} to {names[-1]}, {SEASON_WORDS[season][1]}{tail}"
    return Story(prompt, tuple(told), thing, colour, season)


def colours(thing: str, first: str, last: str) -> Story:
    told = [State(f"a landscape, a {name} {thing}", {"colour": name}, {"object": thing}) for name in (first, last)]
    return Story(f"a landscape, a {first} {thing} turning {last}", tuple(told), thing, first)


def weather(last: str, season: str) -> Story:
    words = {name: f"{SEASON_WORDS[season][0]}, {WEATHER_WORDS[name][0]}" for name in ("clear", last)}
    told = [State(said, {"weather": name}, {"season": season}) for name, said in words.items()]
    return Story(f"{SEASON_WORDS[season][0]}, changing from clear weather to {last}", tuple(told), season=season)


TURN = "a landscape transitioning from"
STORIES = (
    seasons(f"{TURN} winter to spring", "winter", "thaw", "early spring", "blossom", "full spring"),
    seasons(f"{TURN} spring to summer", "early spring", "full spring", "summer"),
    seasons(f"{TURN} summer to autumn", "summer", "late summer", "autumn"),
    seasons(f"{TURN} autumn to winter", "autumn", "late autumn", "winter"),
    seasons(f"{TURN} winter to summer", "winter", "blossom", "summer"),
    seasons(f"{TURN} winter to autumn", "winter", "blossom", "summer", "autumn"),
    seasons(f"{TURN} spring to autumn", "blossom", "summer", "autumn"),
    seasons(f"{TURN} winter to spring", "winter", "thaw", "blossom", thing="house", colour="red"),
    days("day", "dusk", "night"),
    days("night", "dawn", "day", season="autumn"),
    days("dawn", "day", "dusk", season="blossom"),
    days("dusk", "night", "dawn"),
    days("day", "dusk", "night", season="winter", thing="house", colour="white"),
    days("day", "dusk", "night", season="autumn", thing="boat", colour="blue"),
    colours("ball", "red", "blue"),
    colours("car", "yellow", "purple"),
    colours("balloon", "white", "red"),
    colours("ball", "green", "yellow"),
    weather("rain", "summer"),
    weather("snow", "winter"),
)
