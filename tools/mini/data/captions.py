"""Says in varied words what a clip shows, and what of it was said."""

from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, DAYS, MOTIONS, OBJECTS, SEASONS, WEATHERS, Clip

PLACES = (
    "a landscape",
    "the landscape",
    "a view of hills",
    "the countryside",
    "a field and trees",
    "a scene in the hills",
    "a valley",
)
FOLLOWS = ("in", "at", "under", "by", "on", "during", "covered", "transitioning", "changing", "from")
SEASON_WORDS = {
    "winter": (
        "covered in thick snow, bare trees",
        "in winter",
        "in deep winter, everything white with snow",
        "snow covers the ground, the trees are bare",
        "a snowy winter scene, branches without leaves",
        "thick white snow on the hills and bare branches",
    ),
    "thaw": (
        "the snow melts, patches of brown grass",
        "snow begins to melt and patches of grass appear",
        "melting snow, bare trees, brown earth showing through",
        "late winter, the snow is thawing",
        "patches of snow on brown ground",
        "the first thaw reveals patches of ground",
    ),
    "early spring": (
        "green shoots and small buds",
        "early spring, buds appear on the trees",
        "the first buds and green shoots, little snow left",
        "the last snow is gone, the grass is turning green, small buds on the branches",
        "young buds and fresh grass begin to grow",
    ),
    "blossom": (
        "flowers bloom, trees adorned with fresh leaves",
        "in spring",
        "pink blossom on the trees, flowers in the grass",
        "spring flowers bloom everywhere, the trees blossom",
        "blooming flowers and blossoming trees",
        "a spring scene full of flowers",
    ),
    "full spring": (
        "a lush green meadow in full spring",
        "late spring, fresh bright green leaves and flowers",
        "lush bright green grass and trees with light green leaves",
        "in full spring, everything is lush and green with flowers",
    ),
    "summer": (
        "in summer, dark green trees",
        "in summer",
        "a green summer scene, trees with dense leaves",
        "dense dark green foliage and green grass",
        "the trees are full and deep green in the summer",
    ),
    "late summer": (
        "late summer, the grass is dry and golden",
        "dry yellow grass at the end of summer",
        "golden grass and olive green trees",
        "the grass turns yellow in late summer",
    ),
    "autumn": (
        "in autumn, orange leaves",
        "in autumn",
        "orange and red leaves on the trees",
        "an autumn scene, the trees are orange",
        "fall colours, leaves of orange and red",
        "the leaves have turned orange and the grass brown",
    ),
    "late autumn": (
        "late autumn, few brown leaves are left",
        "the leaves fall, brown ground and thin trees",
        "almost bare trees with the last brown leaves before winter",
        "brown leaves fall in late autumn",
    ),
}
DAY_WORDS = {
    "dawn": ("at dawn", "at sunrise", "early in the morning, a soft pink sky", "the sun rises"),
    "day": ("by day", "in daylight", "under a bright blue sky", "at noon", "the sun stands high", "on a bright day"),
    "dusk": ("at dusk", "at sunset", "in the evening, an orange and purple sky", "the sun sets", "in the evening light"),
    "night": ("at night", "under a dark sky", "in the moonlight", "the moon stands in a dark night sky", "late at night"),
}
WEATHER_WORDS = {
    "clear": ("clear weather", "no clouds", "a clear sky", "fine weather"),
    "rain": ("rain falls", "in the rain", "a grey rainy sky", "it is raining", "heavy rain"),
    "snow": ("snow is falling", "snowflakes fall from a grey sky", "it is snowing", "during a snowfall"),
}
OBJECT_WORDS = {
    "house": ("a {c} house", "a house with {c} walls", "a small {c} house", "a {c} cottage"),
    "boat": ("a {c} boat on a pond", "a {c} sailing boat", "a small {c} boat on the water", "a {c} boat"),
    "car": ("a {c} car", "a {c} car on the grass", "a small {c} car"),
    "ball": ("a {c} ball", "a big {c} ball", "a round {c} ball"),
    "balloon": ("a {c} balloon in the sky", "a {c} hot air balloon", "a {c} balloon"),
}
MOTION_WORDS = {
    "left": ("moving to the left", "going left", "heading left"),
    "still": ("standing still", "at rest", "not moving"),
    "right": ("moving to the right", "going right", "heading right"),
}
CAMERA_WORDS = {
    "left": ("the camera pans right", "camera moving right"),  # things drift the other way
    "still": ("static camera", "a fixed camera"),
    "right": ("the camera pans left", "camera moving left"),
}
SEASON_NAMES = {
    "winter": "winter",
    "thaw": "winter",
    "early spring": "spring",
    "blossom": "spring",
    "full spring": "spring",
    "summer": "summer",
    "late summer": "summer",
    "autumn": "autumn",
    "late autumn": "autumn",
}
CHANGES = (
    "transitioning from {a} to {b}",
    "{a} turns into {b}",
    "changing from {a} to {b}",
    "from {a} to {b}",
    "{a} becomes {b}",
)
TURNS = ("turning", "becoming", "turns", "becomes", "changing to")
BLOCKS = {
    "season": len(SEASONS),
    "day": len(DAYS),
    "weather": len(WEATHERS),
    "object": len(OBJECTS),
    "colour": len(COLOURS),
    "motion": len(MOTIONS),
    "camera": len(MOTIONS),
}


@dataclass(frozen=True)
class Caption:
    """Words and what they say: for each factor in BLOCKS a row of shares that sum to one, all zeros if unsaid."""

    text: str
    said: dict[str, np.ndarray]

    @property
    def target(self) -> np.ndarray:
        """Returns all factors side by side: (34,) float32."""
        return np.concatenate([self.said.get(name, np.zeros(size)) for name, size in BLOCKS.items()]).astype(np.float32)


def hats(at: float, positions: list[float]) -> np.ndarray:
    """Shares a place on the circle of length 4 between the two nearest positions."""
    corners = np.eye(len(positions), dtype=np.float32)
    corners = np.concatenate([corners, corners[:1]])  # the circle closes
    return np.array([np.interp(at % 4, [*positions, 4.0], corner) for corner in corners.T], np.float32)


def one(options: tuple[str, ...] | list[str], name: str) -> np.ndarray:
    return np.array([option == name for option in options], np.float32)


def nearest(at: float, positions: dict[str, float]) -> str:
    return min(positions, key=lambda name: abs((at - positions[name] + 2) % 4 - 2))


def caption(clip: Clip, rng: np.random.Generator) -> Caption:
    """Describes a clip. A clip that changes is told as a change, or as what its middle looks like."""
    said: dict[str, np.ndarray] = {}
    parts: list[str] = []
    days = {name: float(i) for i, name in enumerate(DAYS)}

    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    def circle(
        factor: str, values: np.ndarray, positions: dict[str, float], words: dict, names: dict[str, str], chance: float
    ) -> None:
        first, middle, last = (nearest(values[i], positions) for i in (0, len(values) // 2, -1))
        places = list(positions.values())
        if names[first] != names[last] and rng.random() < 0.5:
            parts.append(pick(CHANGES).format(a=names[first], b=names[last]))
            said[factor] = (hats(positions[first], places) + hats(positions[last], places)) / 2
        elif rng.random() < chance:
            parts.append(pick(words[middle]))
            said[factor] = hats(positions[middle], places)

    circle("season", clip.season, SEASONS, SEASON_WORDS, SEASON_NAMES, 0.92)
    # daylight and fine weather go without saying
    usual = abs((clip.day[0] - 1 + 2) % 4 - 2) < 0.5
    circle("day", clip.day, days, DAY_WORDS, {name: name for name in DAYS}, 0.35 if usual else 0.92)
    if rng.random() < (0.15 if clip.weather == "clear" else 0.92):
        parts.append(pick(WEATHER_WORDS[clip.weather]))
        said["weather"] = one(WEATHERS, clip.weather)
    if clip.object != "none" and rng.random() < 0.95:
        first, last = clip.colour_names
        names = list(COLOURS)
        words, colour = pick(OBJECT_WORDS[clip.object]), first
        said["colour"] = one(names, first)
        if first != last:
            if rng.random() < 0.5:
                colour, said["colour"] = last, one(names, last)
            else:
                words += f" {pick(TURNS)} {last}"
                said["colour"] = (one(names, first) + one(names, last)) / 2
        words = words.format(c=colour)
        said["object"] = one(OBJECTS, clip.object)
        if rng.random() < (0.3 if clip.object != "house" else 0.0):
            words += " " + pick(MOTION_WORDS[clip.motion])
            said["motion"] = one(list(MOTIONS), clip.motion)
        parts.append(words)
    if rng.random() < (0.04 if clip.camera == "still" else 0.3):
        parts.append(pick(CAMERA_WORDS[clip.camera]))
        said["camera"] = one(list(MOTIONS), clip.camera)
    parts = [parts[i] for i in rng.permutation(len(parts))]
    if not parts or rng.random() < 0.6:
        parts = [pick(PLACES), *parts]
        joint = " " if len(parts) > 1 and parts[1].split()[0] in FOLLOWS else ", "
        text = joint.join(parts[:2]) + "".join(f", {part}" for part in parts[2:])
    else:
        text = ", ".join(parts)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + rng.choice(["", "."])
    return Caption(str(text), said)


def vocabulary() -> list[str]:
    """Returns every word that a caption can hold, sorted."""
    texts = [
        *PLACES,
        *DAYS,
        *WEATHERS,
        *OBJECTS,
        *COLOURS,
        *CHANGES,
        *SEASON_NAMES.values(),
        "turning becoming turns becomes changing to",
    ]
    for table in (SEASON_WORDS, DAY_WORDS, WEATHER_WORDS, OBJECT_WORDS, MOTION_WORDS, CAMERA_WORDS):
        texts += [line for lines in table.values() for line in lines]
    words = " ".join(texts).replace("{c}", " ").replace("{a}", " ").replace("{b}", " ").replace(",", " ").split()
    return sorted({word.lower() for word in words})
