"""A small selection of a large matrix of cases: every pair of values of any two axes occurs in one case at least."""

from collections.abc import Sequence
from itertools import combinations
from random import Random
from typing import Any

TRIES = 40


def pairwise(axes: dict[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Chooses cases greedily: each takes the best of some random ones built on a pair that no case has yet."""
    random = Random(seed)
    missing = {((a, x), (b, y)) for a, b in combinations(axes, 2) for x in axes[a] for y in axes[b]}
    cases = []
    while missing:
        fixed = dict(min(missing, key=repr))
        tries = [{name: fixed.get(name, random.choice(values)) for name, values in axes.items()} for _ in range(TRIES)]
        case = max(tries, key=lambda case: len(missing & set(combinations(case.items(), 2))))
        missing -= set(combinations(case.items(), 2))
        cases.append(case)
    return cases
