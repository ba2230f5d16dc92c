"""Draws a clip's frames as pixels, all frames of a clip at once."""

import numpy as np

from .scenes import Clip

HEIGHT, WIDTH = 96, 128
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
PARTICLES = 45
THING = 1.3  # how much larger than drawn an object appears

SNOW = ([0, 0.45, 0.75, 1.0, 3.4, 3.7, 4.0], [1.0, 0.5, 0.12, 0.0, 0.0, 0.35, 1.0])
FOLIAGE = ([0, 0.5, 0.75, 1.05, 1.5, 3.0, 3.5, 3.8, 4.0], [0.0, 0.0, 0.45, 0.85, 1.0, 0.95, 0.4, 0.0, 0.0])
FLOWERS = ([0, 0.7, 1.05, 1.5, 2.0, 4.0], [0.0, 0.0, 1.0, 0.7, 0.0, 0.0])
LEAF = (
    [0, 0.75, 1.05, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    [
        (0.6, 0.8, 0.4),
        (0.6, 0.8, 0.4),
        (0.96, 0.62, 0.78),
        (0.42, 0.80, 0.28),
        (0.10, 0.46, 0.14),
        (0.42, 0.50, 0.10),
        (0.93, 0.42, 0.06),
        (0.62, 0.26, 0.08),
        (0.5, 0.3, 0.1),
    ],
)
GRASS = (
    [0, 0.45, 0.75, 1.05, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
    [
        (0.55, 0.42, 0.26),
        (0.56, 0.43, 0.24),
        (0.55, 0.60, 0.26),
        (0.45, 0.74, 0.28),
        (0.36, 0.72, 0.20),
        (0.18, 0.52, 0.14),
        (0.80, 0.72, 0.22),
        (0.78, 0.50, 0.16),
        (0.56, 0.38, 0.18),
        (0.55, 0.42, 0.26),
    ],
)
SKY_TOP = (
    [0, 1, 2, 3, 4],
    [(0.45, 0.50, 0.78), (0.25, 0.52, 0.95), (0.32, 0.18, 0.50), (0.02, 0.03, 0.13), (0.45, 0.50, 0.78)],
)
SKY_LOW = ([0, 1, 2, 3, 4], [(1.0, 0.78, 0.62), (0.74, 0.88, 1.0), (1.0, 0.45, 0.18), (0.10, 0.13, 0.30), (1.0, 0.78, 0.62)])
LIGHT = ([0, 1, 2, 3, 4], [(0.92, 0.80, 0.80), (1.0, 1.0, 1.0), (0.82, 0.56, 0.52), (0.36, 0.40, 0.60), (0.92, 0.80, 0.80)])


def rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


WHITE = rgb(0.95, 0.97, 1.0)


def around(table: tuple, at: np.ndarray) -> np.ndarray:
    """Reads a table of values or colours on a circle of length 4: (T,) or (T, 3)."""
    positions, values = table
    values = np.asarray(values, np.float32)
    at = np.mod(at, 4.0)
    if values.ndim == 1:
        return np.interp(at, positions, values).astype(np.float32)
    return np.stack([np.interp(at, positions, channel) for channel in values.T], -1).astype(np.float32)


def paint(frames: np.ndarray, mask: np.ndarray, colour: np.ndarray, box: tuple[slice, slice] | None = None) -> None:
    """Mixes a colour, (3,) or (T, 3), into the frames where the mask, (h, w) or (T, h, w), is above 0."""
    rows, columns = box or (slice(None), slice(None))
    part = frames[:, rows, columns]
    colour = np.asarray(colour, np.float32)
    colour = colour[:, None, None] if colour.ndim == 2 else colour
    part += np.asarray(mask, np.float32)[..., None] * (colour - part)


def soft(distance: np.ndarray) -> np.ndarray:
    """Turns a distance in pixels (negative inside) into cover with an edge one pixel wide."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def disc(x: np.ndarray, y: np.ndarray, radius: np.ndarray | float, stretch: float = 1.0) -> np.ndarray:
    return soft(np.sqrt(x * x + (y * stretch) ** 2) - radius)


def rectangle(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return soft(np.maximum(np.abs(x) - half_width, np.abs(y) - half_height))


def per_frame(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None]


def waves(rng: np.random.Generator, x: np.ndarray, height: float, length: float) -> np.ndarray:
    """Returns a smooth random line over x."""
    phases = rng.uniform(0, 2 * np.pi, 3)
    return sum(height / (i + 1) * np.sin(x * 2 * np.pi * (i + 1) / length + phases[i]) for i in range(3))


def texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns a smooth random field with values spread over 0 to 1, patches a dozen pixels wide."""
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for _ in range(4):
        fx, fy, phase = rng.uniform(0.05, 0.13), rng.uniform(0.10, 0.22), rng.uniform(0, 2 * np.pi)
        total += np.sin(x * fx + y * fy * rng.choice([-1, 1]) + phase)
    return np.clip(0.5 + total / 5, 0.0, 1.0)


def sky(clip: Clip, light: np.ndarray, gloom: np.ndarray) -> np.ndarray:
    """Returns a sky gradient with sun or moon, greyed by bad weather: (T, H, W, 3)."""
    height = (Y / (HEIGHT * 0.6)).clip(0, 1)[None, ..., None]
    top, low = around(SKY_TOP, clip.day)[:, None, None], around(SKY_LOW, clip.day)[:, None, None]
    frames = top + height * (low - top)
    day = np.mod(clip.day + 0.4, 4.0) - 0.4  # from before dawn to after night
    sun_x, sun_y = 12 + day * 52, 52 - 40 * np.sin((day + 0.35) / 2.7 * np.pi)
    paint(frames, disc(X - per_frame(sun_x), Y - per_frame(sun_y), 8.0), rgb(1.0, 0.95, 0.65))
    moon = np.clip(1.6 - 2.5 * np.abs(day - 3.0), 0, 1)
    paint(frames, disc(X - per_frame(64 + (day - 3.0) * 50), Y - 18, 7.0) * per_frame(moon), rgb(0.93, 0.93, 0.85))
    grey = rgb(0.62, 0.65, 0.70) * light
    return frames + per_frame(gloom)[..., None] * (grey[:, None, None] - frames)


def tree(frames: np.ndarray, clip: Clip, x: float, base: float, size: float, lit: np.ndarray) -> None:
    """A trunk with branches, and a crown as full and of the colour that the season says."""
    foliage, snow = around(FOLIAGE, clip.season), around(SNOW, clip.season)
    rows = slice(max(0, int(base - 2.4 * size)), min(HEIGHT, int(base + 2)))
    reach = np.abs(clip.drift).max() + 1.4 * size
    columns = slice(max(0, int(x - reach)), min(WIDTH, int(x + reach) + 1))
    if rows.stop <= rows.start or columns.stop <= columns.start:
        return
    dx, dy = X[rows, columns] - per_frame(x - clip.drift), Y[rows, columns] - base
    wood = rgb(0.33, 0.22, 0.14) * lit
    box = (rows, columns)
    paint(frames, rectangle(dx, dy + 0.55 * size, 0.1 * size + 0.8, 0.55 * size), wood, box)
    for lean in (-0.75, 0.75, -0.3, 0.3):
        along = np.clip(-(dy + 0.8 * size) / (1.1 * size), 0, 1)
        branch = soft(np.abs(dx - lean * size * along * 0.9) - 1.5 + 0.7 * along)
        inside = ((dy < -0.8 * size) & (dy > -1.9 * size)).astype(np.float32)
        paint(frames, branch * inside, wood + per_frame(snow * 0.3)[:, 0] * (WHITE * lit - wood), box)
    crown = disc(dx, dy + 1.4 * size, per_frame(0.95 * size * np.sqrt(foliage)), 1.1)
    shade = around(LEAF, clip.season) * lit
    paint(frames, crown * per_frame(np.minimum(1.0, 3 * foliage)), shade * 0.8, box)
    paint(frames, disc(dx + 0.2 * size, dy + 1.55 * size, per_frame(0.6 * size * np.sqrt(foliage)), 1.1), shade, box)


def thing(frames: np.ndarray, clip: Clip, rng: np.random.Generator, ground: float, lit: np.ndarray) -> None:
    """The clip's object, moving along."""
    x = (X - per_frame(rng.uniform(44, 84) + clip.travel - clip.travel.mean() - clip.drift)) / THING
    base = ground + rng.uniform(18, 26)
    y = np.broadcast_to((Y - base) / THING, x.shape)
    paint_colour, dark = clip.colour * lit, rgb(0.12, 0.12, 0.14) * lit
    if clip.object == "house":
        roof = soft(np.maximum(np.abs(x) * 0.75 - (y + 31), y + 17))
        paint(frames, rectangle(x, y + 9, 14, 9), paint_colour)
        paint(frames, roof, paint_colour * 0.55)
        window = np.minimum(1.0, around(([0, 1, 2, 3, 4], [0.3, 0.0, 0.6, 1.0, 0.3]), clip.day))[:, None]
        paint(frames, rectangle(np.abs(x) - 7, y + 10, 2.5, 3), dark + window * (rgb(1.0, 0.85, 0.4) - dark))
    elif clip.object == "boat":
        paint(frames, disc(x * 0.45, y + 1, 17.0, 2.2), rgb(0.22, 0.45, 0.75) * lit)
        paint(frames, soft(np.maximum(np.abs(x) + 0.8 * y - 15, np.abs(y + 2) - 4)), paint_colour)
        paint(frames, rectangle(x, y + 15, 0.9, 9), dark)
        paint(frames, soft(np.maximum(np.maximum(1.5 - x, x * 1.3 + (-y - 24)), y + 8)), rgb(0.95, 0.95, 0.9) * lit)
    elif clip.object == "car":
        paint(frames, rectangle(x, y + 7, 15, 4.5), paint_colour)
        paint(frames, soft(np.maximum(np.abs(x + 1) - 0.5 * (y + 11) - 8, np.abs(y + 14) - 4)), paint_colour * 0.8)
        paint(frames, disc(np.abs(x) - 9, y + 2.5, 3.8), dark)
    elif clip.object == "ball":
        bounce = 10 * np.abs(np.sin(np.arange(clip.frames) * 0.45)) * (clip.motion != "still")
        y = y + per_frame(bounce)
        paint(frames, disc(x, y + 11, 11.0), paint_colour)
        paint(frames, disc(x + 4, y + 15, 3.0), np.minimum(1.0, paint_colour + 0.35))
    elif clip.object == "balloon":
        y = np.broadcast_to((Y - rng.uniform(24, 34) + per_frame(0.2 * np.abs(clip.travel))) / THING, x.shape)
        paint(frames, soft(np.maximum(np.abs(x) + 0.5 * (y - 21), np.abs(y - 12) - 6)), paint_colour * 0.75)
        paint(frames, disc(x, y, 13.0), paint_colour)
        paint(frames, rectangle(x, y - 21, 3.0, 2.5), rgb(0.4, 0.26, 0.13) * lit)


def falling(frames: np.ndarray, clip: Clip, rng: np.random.Generator, lit: np.ndarray) -> None:
    """Rain as slanted streaks, or snow as flakes, falling through the frames."""
    time = np.arange(clip.frames)[:, None]
    speed, length, slant = (9.0, 9, 0.3) if clip.weather == "rain" else (2.5, 3, 0.0)
    column = rng.uniform(0, WIDTH, PARTICLES) + time * speed * slant
    row = rng.uniform(0, HEIGHT, PARTICLES) + time * speed * rng.uniform(0.8, 1.2, PARTICLES)
    shown = (np.arange(PARTICLES) / PARTICLES < clip.weather_amount[:, None]).astype(np.float32)
    mask = np.zeros((clip.frames, HEIGHT, WIDTH), np.float32)
    which = np.broadcast_to(time, row.shape)
    for step in range(length):
        for side in range(1 if clip.weather == "rain" else 3):
            at = (which, (row + step).astype(int) % HEIGHT, (column + side + slant * step).astype(int) % WIDTH)
            np.maximum.at(mask, at, shown)
    colour = rgb(0.75, 0.82, 0.95) if clip.weather == "rain" else rgb(1.0, 1.0, 1.0)
    paint(frames, mask * (0.6 if clip.weather == "rain" else 0.9), colour * np.maximum(lit, 0.6))


def render(clip: Clip) -> np.ndarray:
    """Draws a clip: uint8 (T, 96, 128, 3)."""
    rng = np.random.default_rng(clip.layout)
    light = around(LIGHT, clip.day)
    gloom = (0.85 * clip.weather_amount).astype(np.float32)
    lit = light * (1 - 0.3 * gloom[:, None])
    snow, grass = around(SNOW, clip.season), around(GRASS, clip.season)
    frames = sky(clip, lit, gloom)

    far = X[0] + per_frame(clip.drift)[:, 0] * 0.4
    hill = rng.uniform(44, 50) + waves(rng, far, 9.0, 110.0)
    haze = 0.55 * grass * lit + 0.45 * around(SKY_LOW, clip.day) * (1 - 0.5 * gloom[:, None])
    paint(frames, soft(hill[:, None] - Y), haze + 0.75 * snow[:, None] * (WHITE * lit * 0.92 - haze))

    near = X[0] + per_frame(clip.drift)[:, 0]
    ground = rng.uniform(56, 61)
    line = ground + waves(rng, near, 2.5, 150.0)
    on_ground = soft(line[:, None] - Y)
    paint(frames, on_ground, grass * lit * 0.97)
    field = texture(rng, near[:, None], Y)
    paint(frames, on_ground * np.clip(field * 2 - 1, 0, 1) * 0.2, grass * lit * 0.6)
    flowers = around(FLOWERS, clip.season)
    spots = (2.4 * np.sin(near[:, None] * 0.42 + np.sin(Y * 0.4)) * np.sin(Y * 0.45 + near[:, None] * 0.12) - 0.7).clip(0, 1)
    petal = rgb(*((0.98, 0.45, 0.6), (1.0, 0.9, 0.3), (0.85, 0.5, 0.95))[rng.integers(3)])
    paint(frames, on_ground * spots * per_frame(flowers) * 0.9, petal * lit)
    cover = np.clip((per_frame(snow) * 1.3 - field) * 3.5, 0, 1)
    paint(frames, on_ground * cover, WHITE * lit)

    for _ in range(rng.integers(2, 5)):
        depth = rng.uniform(0, 1)
        x, base, size = rng.uniform(4, 124), ground + 4 + 12 * depth, 13 + 8 * depth
        tree(frames, clip, x, base, size, lit)
    if clip.object != "none":
        thing(frames, clip, rng, ground, lit)
    if clip.weather != "clear":
        falling(frames, clip, rng, lit)
    return (frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)
