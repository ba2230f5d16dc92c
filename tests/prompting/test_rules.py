"""Rules that turn prompts into states without a language model."""

import time

import pytest

from vstar_engine.prompting.rules import LONGEST, states

SPRING = (
    "a landscape covered in thick snow, bare trees",
    "the snow melts, patches of brown grass",
    "green shoots and small buds",
    "flowers bloom, trees adorned with fresh leaves",
    "a lush green meadow in full spring",
)
NIGHTFALL = (
    "by day, under a bright blue sky",
    "in the afternoon, warm low sunlight",
    "at sunset, an orange and purple sky",
    "at dusk, the sky grows dark",
    "at night, the moon stands in a dark sky",
)
TABLE = {
    "A landscape transitioning from winter to spring": SPRING,
    "A landscape transitioning from winter to spring.": SPRING,
    "winter becomes spring": SPRING,
    "time-lapse of the seasons turning from winter to spring": SPRING,
    "day to night": tuple(f"a landscape {words}" for words in NIGHTFALL),
    "A city from day to night.": tuple(f"a city {words}" for words in NIGHTFALL),
    "The day turns to night over Paris": tuple(f"Paris {words}" for words in NIGHTFALL),
    "a landscape from dusk to dawn": (
        "a landscape at dusk, the sky grows dark",
        "a landscape at night, the moon stands in a dark sky",
        "a landscape at dawn, a soft pink sky",
    ),
    "sunny to rainy over a field": (
        "a field under a clear blue sky, bright sun",
        "a field under grey clouds",
        "a field in the rain, a grey rainy sky",
    ),
    "a red ball turning blue": ("a red ball", "a blue ball"),
    "an apple changing from green to red in a bowl": ("a green apple in a bowl", "a red apple in a bowl"),
    "a banana turning brown": ("a banana", "a brown banana"),
    "leaves turn red": ("leaves", "red leaves"),
    "a boy is getting old": ("a young boy", "a young man", "a middle-aged man", "an old man"),
    "a tree growing": ("bare brown soil", "a small green shoot in the soil", "a young tree", "a tall tree"),
    "a flower blooming in a garden": (
        "a closed flower bud in a garden",
        "a flower bud opening in a garden",
        "a half open flower in a garden",
        "a flower in full bloom in a garden",
    ),
    "an old house collapsing": (
        "an old house",
        "an old house with cracked walls",
        "a half collapsed old house",
        "ruins of an old house",
    ),
    "leaves withering": ("fresh leaves", "drooping leaves", "withered brown leaves", "dry dead leaves"),
    "a caterpillar turns into a butterfly": ("a caterpillar", "a butterfly"),
    "water becomes ice": ("water", "ice"),
    "from a seed to a tree": ("a seed", "a tree"),
    "a city changing from empty to crowded": ("an empty city", "a crowded city"),
    "a car driving from the village to the sea": ("a car driving near the village", "a car driving near the sea"),
    "first a seed, then a sprout, finally a flower": ("a seed", "a sprout", "a flower"),
    "a seed -> a sprout -> a flower": ("a seed", "a sprout", "a flower"),
}
UNKNOWN = ["snow", "a boat at dawn", "a wizard casting a spell", "", "  ", "🚀", "a\0b", "x" * (LONGEST + 1) + " day to night"]


@pytest.mark.parametrize(("prompt", "wanted"), TABLE.items(), ids=TABLE.keys())
def test_states(prompt, wanted):
    assert states(prompt) == wanted


@pytest.mark.parametrize("prompt", UNKNOWN, ids=lambda prompt: ascii(prompt[:20]))
def test_a_prompt_that_no_rule_knows_is_its_only_state(prompt):
    assert states(prompt) == (prompt,)


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("a forest from summer to winter", 6),
        ("the seasons change from spring to winter", 7),
        ("a forest through the seasons", 7),
    ],
)
def test_time_goes_forward_around_the_year(prompt, count):
    found = states(prompt)
    assert len(found) == count
    assert found[-1].endswith("covered in thick snow, bare trees")


@pytest.mark.parametrize("unit", [",", "is ", "to ", "the ", "from winter ", "a is ", "turning ", "then ", " from red", "\x00"])
def test_hostile_prompts_take_no_time(unit):
    start = time.process_time()
    states((unit * LONGEST)[:LONGEST])
    assert time.process_time() - start < 1.0
