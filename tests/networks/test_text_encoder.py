import logging

import pytest
import torch

from vstar_engine.config.timeline import anchor_frames
from vstar_engine.prompting.interpolation import spread
from vstar_engine.prompting.tokenizer import END, START, tokenize


def test_long_prompts_keep_their_end_token_and_say_what_was_cut(caplog):
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(["snow " * 20_000])
    assert tokens.shape == (1, 77)
    assert tokens[0, 0] == START
    assert tokens[0, -1] == END
    assert "text 1 of 1 has more than 75 tokens; its last 19925 are not read" in caplog.text
    assert "snow" not in caplog.text


@pytest.mark.parametrize("prompt", ["a\0b", "lone \ud800 surrogate", "🚀🌸", "", "<end_of_text>", "\t\n"], ids=ascii)
def test_odd_prompts_are_tokens_all_the_same(prompt):
    (row,) = tokenize([prompt]).tolist()
    assert row[0] == START
    assert END in row


def test_spread_takes_any_length():
    """The published code holds anchor frames in int8 and breaks from 129 frames on, or 128 with two anchors."""
    anchors = torch.randn(2, 3, 4)
    for frames in (128, 129, 512):
        out = spread(anchors, frames)
        assert torch.equal(out[0], anchors[0])
        assert torch.equal(out[-1], anchors[1])
        middle = torch.lerp(anchors[0], anchors[1], (frames // 2) / (frames - 1))
        assert torch.allclose(out[frames // 2], middle, atol=1e-6)


def test_hold_ends_on_the_last_anchor():
    """The published `same` never shows the last anchor; ours gives it the last frame."""
    anchors = torch.arange(3.0).reshape(3, 1, 1)
    assert spread(anchors, 7, "hold").flatten().tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_one_anchor_is_constant():
    assert torch.equal(spread(torch.ones(1, 2, 3), 5), torch.ones(5, 2, 3))


@pytest.mark.parametrize(
    ("count", "frames", "options", "complaint"),
    [
        (4, 3, {}, "1 to 3 states"),
        (0, 3, {}, "1 to 3 states"),
        (2, 4, {"mode": "cubic"}, "mode"),
        (3, 9, {"at": [0, 4]}, "ascend"),
        (3, 9, {"at": [0, 4, 7]}, "ascend"),
        (3, 9, {"at": [1, 4, 8]}, "ascend"),
        (3, 9, {"at": [0, 0, 8]}, "ascend"),
    ],
)
def test_spread_refuses(count, frames, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        spread(torch.ones(count, 2, 3), frames, **options)


def test_anchor_frames_start_and_end_with_the_clip():
    for frames in range(2, 300, 7):
        for count in range(2, min(frames, 12) + 1):
            where = anchor_frames(count, frames)
            assert where[0] == 0
            assert where[-1] == frames - 1
            assert where == sorted(set(where))
