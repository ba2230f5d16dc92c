"""What TAR multiplies: the largest scaled logit of each row of temporal attention, by level, layer and regularised step.

Of some stories told by VSTAR; every video is one row of JSON, made as far as the last regularised step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vstar_engine import Engine, Tar
from vstar_engine.analysis import attention_maps
from vstar_engine.config.request import Request
from vstar_engine.config.sampling import Sampling

from .results import Row, key, rows
from .stories import STORIES
from .tables import PAPER, by_story, cell, markdown

LENGTHS = (64, 16)
TOLD = (0, 3, 8, 12, 14, 18)  # seasons there and back, times of day with and without an object, a colour, the weather
POSITIONS = range(0, 192, 12)


def cases() -> list[dict[str, int]]:
    return [{"story": story, "seed": 0, "frames": frames} for frames in LENGTHS for story in TOLD]


def measured(engine: Engine, case: dict[str, int], sampling: Sampling, until: int) -> Row:
    """Returns the row of a video: of each attention, in the network's order, what its rows were at every step up to `until`."""
    story, tar = STORIES[case["story"]], Tar(PAPER, until_step=until)
    seed = 1000 * case["story"] + case["seed"]
    with attention_maps.recorded(engine.denoiser, POSITIONS) as recording:  # type: ignore[arg-type]
        batch = engine.begin([Request(tuple(story.texts), case["frames"], seed, sampling=sampling, tar=tar)])
        for _ in range(until + 1):
            batch.step()
    each = len(recording.attentions) // recording.passes
    layers = [recording.attentions[layer::each] for layer in range(each)]
    return {"case": case, "weights": engine.weights, "attentions": [over_steps(layer) for layer in layers]}


def over_steps(layer: list[attention_maps.Attention]) -> dict[str, Any]:
    numbers = {name: [round(getattr(one, name), 3) for one in layer] for name in ("row_max", "positive", "spread")}
    return {"level": layer[0].level} | numbers


def run(path: Path, sampling: Sampling, until: int, limit: int | None) -> None:
    """Makes what is missing from the file."""
    done = {key(row["case"]) for row in rows(path)}
    left = [case for case in cases() if key(case) not in done][:limit]
    engine = Engine.load("mini")
    with path.open("a") as file:
        for case in tqdm(left, "videos", mininterval=10):
            file.write(json.dumps(measured(engine, case, sampling, until)) + "\n")
            file.flush()


def numbered(found: list[Row]) -> dict[str, list[int]]:
    """Returns the attentions of each level, then each by itself, by name."""
    levels = [attention["level"] for attention in found[0]["attentions"]]
    named = {f"level {level}": [i for i, one in enumerate(levels) if one == level] for level in sorted(set(levels))}
    one_by_one = {f"level {level}, transformer {i // 2 + 1}, attn{i % 2 + 1}": [i] for i, level in enumerate(levels)}
    return named | one_by_one


def line(found: list[Row], which: list[int]) -> list[str]:
    """Returns the mean row maximum of attentions at each length, its lowest and highest step, and the share above 0."""
    cells = []
    for frames in LENGTHS:
        taken = [row for row in found if row["case"]["frames"] == frames]
        tops = np.array([[row["attentions"][i]["row_max"] for i in which] for row in taken]).mean((0, 1))
        cells += [
            cell(list(by_story(taken, lambda row: np.mean([row["attentions"][i]["row_max"] for i in which])).values())),
            f"{tops.min():.2f} to {tops.max():.2f}",
            f"{np.mean([row['attentions'][i]['positive'] for row in taken for i in which]):.0%}",
        ]
    return cells


def tables(found: list[Row]) -> dict[str, str]:
    head = [f"{what}, {frames} frames" for frames in LENGTHS for what in ("row maximum", "by step", "above 0")]
    if {row["case"]["frames"] for row in found} != set(LENGTHS):
        return {"logits": ""}
    return {"logits": markdown(["attention", *head], [[name, *line(found, which)] for name, which in numbered(found).items()])}
