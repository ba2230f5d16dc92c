"""How the mini model was trained, what its claims are measured by, and the tables that tell them."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tools.mini import gallery, train
from tools.mini.claims import logits, measures, results, stories, study, tables
from tools.mini.data import captions
from tools.mini.data.render import render
from tools.mini.data.scenes import sample
from tools.mini.training import loop, probe, vae
from tools.mini.training.pack import pack
from vstar_engine import Engine, Sampling
from vstar_engine.artifacts.manifest import WEIGHTS, read_manifest
from vstar_engine.config.models import VaeSpec, model_named
from vstar_engine.config.sampling import FAST
from vstar_engine.networks.text_encoder import TextTower
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae


@pytest.fixture(autouse=True)
def _without_dreamsim(modules):
    """DreamSim, where it is installed, would fetch its weights."""
    modules({"dreamsim": None})


def test_states_in_order():
    assert measures.in_order(np.array([0, 0, 1, 2, 2]), 3) == 3
    assert measures.in_order(np.array([2, 1, 0]), 3) == 1
    assert measures.in_order(np.array([0, 2, 1, 0]), 3) == 2
    assert measures.in_order(np.array([1, 1]), 3) == 1


@pytest.mark.parametrize(
    ("nearest", "due", "expected"),
    [
        ("001122", (2, 2, 2), 1.0),
        ("000000", (2, 2, 2), 1 / 3),
        ("221100", (2, 2, 2), 1 / 3),
        ("000022", (2, 2, 2), 2 / 3),
        ("011222", (2, 2, 2), (1 / 2 + 1 + 1) / 3),
        ("010101", (3, 3), (2 / 3 + 2 / 3) / 2),
        ("001011", (3, 3), (3 / 4 + 2 / 3) / 2),
    ],
    ids=["told", "still", "backwards", "one left out", "one cut short", "flickering", "one flicker"],
)
def test_states_held(nearest, due, expected):
    assert measures.held(np.array([int(state) for state in nearest]), np.array(due)) == pytest.approx(expected)


@pytest.mark.parametrize("frames", [16, 64])
def test_flicker_holds_no_states_though_it_visits_them_in_order(frames):
    rng = np.random.default_rng(0)
    due = np.bincount(measures.spread(frames, 3).argmax(1))
    random = [rng.integers(0, 3, frames) for _ in range(20)]
    assert np.mean([measures.in_order(labels, 3) / 3 for labels in random]) > 0.95
    assert np.mean([measures.held(labels, due) for labels in random]) < 0.5


def test_the_best_division_is_found():
    rng = np.random.default_rng(0)
    for _ in range(10):
        labels, due = rng.integers(0, 3, 9), np.array([2, 5, 2])
        ends = [(0, one, two, 9) for one in range(10) for two in range(one, 10)]
        divided = [
            sum((labels[cut[k] : cut[k + 1]] == k).sum() / max(cut[k + 1] - cut[k], due[k]) for k in range(3)) / 3
            for cut in ends
        ]
        assert measures.held(labels, due) == pytest.approx(max(divided))


def test_alignment_with_all_that_is_stated_counts_what_stays_too():
    told = stories.STORIES[7].states  # a red house from winter to spring
    read = {name: np.stack([shares] * 4) for name, shares in (told[0].shares() | told[0].kept_shares()).items()}
    assert set(read) == {"season", "object", "colour"}
    weights = np.eye(3)[[0, 0, 2, 2]]
    changing = [state.shares() for state in told]
    assert measures.alignment(read, changing, weights) == pytest.approx(0.5)
    assert measures.alignment(read, [state.shares() | state.kept_shares() for state in told], weights) == pytest.approx(5 / 6)
    read["colour"] = np.roll(read["colour"], 1, axis=1)  # another colour
    assert measures.alignment(read, [state.shares() | state.kept_shares() for state in told], weights) == pytest.approx(0.5)


def test_dreamsim_is_measured_and_missed_only_where_it_is_installed(modules):
    frames, reader = render(sample(3, 4)), probe.load(study.PROBE)
    row = {"numbers": measures.measure(reader, stories.STORIES[14], frames)}
    assert study.lacks(row) == []
    unlike = iter(torch.eye(len(frames)))
    model = SimpleNamespace(embed=lambda picture: next(unlike)[None])
    modules({"dreamsim": SimpleNamespace(dreamsim=lambda pretrained, device: (model, np.array))})
    assert study.lacks(row) == ["dreamsim"]
    measures.similarity._dreamsim.cache_clear()
    try:
        row = {"numbers": measures.measure(reader, stories.STORIES[14], frames)}
    finally:
        measures.similarity._dreamsim.cache_clear()
    assert row["numbers"]["dreamsim"]["dynamics"] == 1.0
    assert study.lacks(row) == []


@pytest.mark.parametrize("story", stories.STORIES, ids=lambda story: story.prompt[:40].replace(" ", "_"))
def test_what_a_story_states_is_in_its_words(story):
    for state in story.states:
        assert state.factors.keys().isdisjoint(state.kept)
        for factor, name in state.kept.items():
            words = captions.SEASON_WORDS[name] if factor == "season" else (name,)
            assert any(said in state.words for said in words), (state.words, name)


def test_a_still_and_a_shuffled_story_are_made_of_its_frames():
    story, still, shuffled = (study.make(None, study.Case(arm, 3, 1, 16)) for arm in ("story", "still", "shuffled"))
    assert (still == story[0]).all()
    assert (shuffled != story).any()
    assert sorted(frame.tobytes() for frame in shuffled) == sorted(frame.tobytes() for frame in story)


def test_every_story_is_told_in_every_arm():
    cases = list(dict.fromkeys(study.cases()))
    at_64 = [case for case in cases if case.frames == 64 and case.sigma in ((), ((0, 1.0), (1, 8.0))) and not case.fast]
    assert len(cases) == len({case.key for case in cases})
    assert len([c for c in at_64 if c.arm == "base"]) == 60
    assert len([c for c in at_64 if c.arm == "both"]) == 60


def test_every_option_of_fast_has_its_exact_videos():
    cases = {case.key for case in study.cases()}
    lossy = [case for case in study.cases() if case.fast]
    assert {name for case in lossy for name in case.fast.split(",")} == set(FAST)
    assert len(lossy) == len(tables.FASTER) * 2 * 5
    assert all(replace(case, fast="").key in cases for case in lossy)
    assert "fast" not in replace(lossy[0], fast="").content


@pytest.mark.parametrize(("fast", "steps"), [(fast, 4 if fast == "few-step" else 10) for fast in ("", *tables.FASTER)])
def test_an_option_is_sampled_as_it_is_named_and_regularised_as_long(fast, steps):
    case = study.Case("both", 0, 0, 16, (), fast)
    assert case.sampling.steps == steps
    assert set(case.sampling.fast) == {name for name in fast.split(",") if name not in ("", "fp8")}
    assert study.until(steps) == {10: 5, 4: 1}[steps]


@pytest.fixture
def one_table(monkeypatch):
    """Lays each table out whole, however wide."""
    monkeypatch.setattr(tables, "WIDEST", 100)


def test_a_wide_table_is_laid_out_as_several_with_its_first_column():
    head = ["arm", *"abcdefg"]
    made = tables.markdown(head, [["x", *"1234567"], ["y", "1", "", "", "", "", "", ""]])
    first, second = (part.splitlines() for part in made.split("\n\n"))
    assert (first[0], second[0]) == ("| arm | a | b | c |", "| arm | d | e | f | g |")
    assert first[2:] == ["| x | 1 | 2 | 3 |", "| y | 1 |  |  |"]
    assert second[2:] == ["| x | 4 | 5 | 6 | 7 |"]


@pytest.mark.usefixtures("one_table")
def test_what_fast_costs_is_told_beside_the_exact_videos_of_the_same_stories():
    found = [measured("both", story, 0.1 * story) for story in range(4)]
    lossy = [measured("both", story, 0.1 * story + 0.3) for story in (1, 3)]
    found += [row | {"case": row["case"] | {"fast": "guidance-interval,step-cache"}} for row in lossy]
    made = tables.tables(found)
    assert [line.split(" | ")[:2] for line in made["fast-64"].splitlines()[2:]] == [
        ["| exact", "0.200 [0.100, 0.300]"],
        ["| guidance-interval, step-cache", "0.500 [0.400, 0.600]"],
    ]
    assert made["fast-16"] == ""
    assert "| states and TAR (VSTAR) | 0.150" in made["frames-64"]


def measured(arm, story, dynamics, extra=(), frames=64, sigma=None):
    numbers = {name: {"dynamics": dynamics, "neighbours": 0.99} for name in ("pixels", "features", "factors", *extra)}
    for similarity in numbers.values():
        similarity["curve"] = {str(apart): 1 - dynamics for apart in tables.SHOWN}
    numbers |= {"visited": 1.0, "held": 0.75, "at_anchors": 0.5, "alignment": 0.25, "stated": 0.125, "cuts": 0}
    usual = tables.PAPER if arm in ("tar", "both") else {}
    levels = [list(level) for level in (usual if sigma is None else sigma).items()]
    return {"case": {"arm": arm, "story": story, "seed": 0, "frames": frames, "sigma": levels}, "numbers": numbers}


@pytest.mark.usefixtures("one_table")
@pytest.mark.parametrize("extra", [(), ("dreamsim",)])
def test_tables_show_a_planted_difference_by_every_measure(extra):
    found = [measured("base", story, 0.1 * story, extra) for story in range(4)]
    found += [measured("both", story, 0.1 * story + 0.3, extra) for story in range(4)]
    made = tables.tables(found)
    line = next(line for line in made["differences"].splitlines() if line.startswith("| VSTAR - base, 64 frames"))
    assert line.count("0.300 [0.300, 0.300]") == (4 if extra else 3)
    assert ("DreamSim" in made["frames-64"]) == bool(extra)
    assert made["frames-16"] == ""
    curves = made["intervals-64"].splitlines()[2:]
    names = [measure for measure in tables.MEASURES if measure != "dreamsim" or extra]
    assert [line.split(":")[0] for line in curves] == [f"| {name}" for name in names for _ in range(2)]
    assert all(line.endswith("| 0.550 [0.450, 0.650] |") for line in curves[1::2])


@pytest.mark.usefixtures("one_table")
def test_a_measure_that_some_rows_lack_is_shown_with_how_many_have_it():
    found = [measured(arm, story, 0.2, ("dreamsim",) if story < 2 else ()) for arm in ("base", "both") for story in range(4)]
    found += [measured("tar", story, 0.2) for story in range(4)]
    made = tables.tables(found)
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in made["frames-64"].splitlines())
    shown = {line[0]: line[head.index("dynamics, DreamSim")] for line in lines}
    assert shown[tables.ARMS["both"]] == "0.200 [0.200, 0.200] (2 videos)"
    assert shown[tables.ARMS["tar"]] == ""
    assert "0.000 [0.000, 0.000] (2 videos)" in made["differences"]


@pytest.mark.usefixtures("one_table")
def test_clips_of_other_scenes_are_not_judged_by_the_story():
    found = [measured(arm, story, 0.2) for arm in ("clips", "base") for story in range(4)]
    made = tables.tables(found)
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in made["frames-64"].splitlines())
    cells = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    for name in tables.TELLING:
        assert cells[tables.ARMS["clips"]][name] == ""
        assert cells[tables.ARMS["base"]][name] != ""
    assert cells[tables.ARMS["clips"]]["dynamics, pixels"] == "0.200 [0.200, 0.200]"
    difference = next(line for line in made["differences"].splitlines() if line.startswith("| rendered clips - base"))
    assert difference.count("0.000 [0.000, 0.000]") == 6


@pytest.mark.usefixtures("one_table")
def test_a_pair_of_settings_is_told_where_both_were_measured():
    found = [measured("vsp", 0, 0.1), measured("both", 0, 0.2, sigma={0: 0.5})]
    assert [line.split(" | ")[0] for line in tables.tables(found)["sigma-both"].splitlines()[2:]] == [
        "| states, no TAR",
        "| states, level 0: 0.5 - no TAR",
    ]


@pytest.mark.usefixtures("one_table")
def test_a_setting_is_told_by_what_it_changes_story_by_story():
    found = [measured("vsp", story, 0.1 * story) for story in range(0, 8, 2)]
    found += [
        measured("both", story, 0.1 * story + 0.01 * sigma, sigma={0: sigma}) for story in range(8) for sigma in (0.5, 16.0)
    ]
    lines = tables.tables(found)["sigma-both"].splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| states, no TAR", "0.300 [0.100, 0.500]"],
        ["| states, level 0: 0.5 - no TAR", "0.005 [0.005, 0.005]"],
        ["| states, level 0: 16 - no TAR", "0.160 [0.160, 0.160]"],
        ["| states, level 0: 0.5 - level 0: 16", "-0.155 [-0.155, -0.155]"],
    ]


@pytest.mark.parametrize("path", study.DOCUMENTS, ids=lambda path: path.name)
def test_the_claims_in_documents_are_those_measured(path, committed):
    document = path.read_text()
    assert "<!-- claims:" in document
    assert study.renewed(document, committed) == document


def test_the_gallery_makes_the_picture_of_make_demo():
    make = (study.ROOT / "Makefile").read_text()
    (states,) = re.findall(r"^DEMO_STATES = ((?:.*\\\n)*.*)", make, re.MULTILINE)
    assert gallery.STORIES[gallery.DEMO][1] == re.findall(r'"(.*?)"', states)
    assert f"$(DEMO_STATES) --frames {gallery.FRAMES} --guidance {gallery.SAMPLING.guidance:g} --out" in make


@pytest.fixture(scope="module")
def committed():
    return study.every_table()


@pytest.mark.parametrize("path", [study.RESULTS, study.LOGITS, study.SOLVERS], ids=lambda path: path.name)
def test_committed_rows_are_of_the_bundled_weights(path):
    assert results.rows(path)


def test_rows_of_other_weights_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    ours, other = ({"case": {"story": i}, "weights": w} for i, w in enumerate((results.bundled_weights(), "0" * 64)))
    path.write_text(f"{json.dumps(ours)}\n")
    assert results.rows(path) == [ours]
    path.write_text(f"{json.dumps(ours)}\n{json.dumps(other)}\n")
    with pytest.raises(ValueError, match="1 of 2 rows were made with weights 000000000000"):
        results.rows(path)


def test_the_newest_row_of_a_video_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    made = [{"case": {"story": story}, "weights": results.bundled_weights(), "numbers": i} for i, story in enumerate((0, 1, 0))]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    assert sorted(row["numbers"] for row in results.rows(path)) == [1, 2]
    results.without_replaced(path)
    assert len(path.read_text().splitlines()) == 2


def test_a_run_makes_what_is_missing_and_backfills_when_told(tmp_path, capsys):
    wanted = [study.Case("still", story, 0, 4) for story in range(3)]
    path, here = (
        tmp_path / "rows.jsonl",
        partial(study.run, wanted=wanted, executor=lambda *given, **named: ThreadPoolExecutor(1)),
    )
    here(path, 1, False)
    (whole,) = results.rows(path)
    assert study.lacks(whole) == []
    old = {
        "case": whole["case"] | {"story": 1},
        "weights": whole["weights"],
        "numbers": {"pixels": {}, "features": {}, "factors": {}},
    }
    path.write_text(f"{json.dumps(whole)}\n{json.dumps(old)}\n")
    here(path, None, False)
    found = {row["case"]["story"]: row for row in results.rows(path)}
    assert found[1] == old
    assert found[2]["numbers"]["held"] > 0
    assert (
        "1 videos were measured without alignment, at_anchors, cuts, held, nearest, stated, visited" in capsys.readouterr().out
    )
    here(path, None, True)
    assert [study.lacks(row) for row in results.rows(path)] == [[], [], []]
    assert "measured without" not in capsys.readouterr().out


@pytest.mark.usefixtures("one_table")
def test_logits_tell_each_attention_and_each_level(mini):
    row = logits.measured(mini, {"story": 14, "seed": 0, "frames": 4}, Sampling(steps=3, guidance=6.0), 1)
    assert [one["level"] for one in row["attentions"]] == [0, 0, 1, 1, *[2] * 8, 1, 1, 1, 1, 0, 0, 0, 0]
    for one in row["attentions"]:
        assert len(one["row_max"]) == len(one["positive"]) == len(one["spread"]) == 2
    found = [row | {"case": row["case"] | {"frames": frames}} for frames in logits.LENGTHS]
    lines = logits.tables(found)["logits"].splitlines()[2:]
    assert len(lines) == 3 + 20
    tops = np.mean([one["row_max"] for one in row["attentions"] if one["level"] == 1])
    assert lines[1].startswith(f"| level 1 | {tops:.3f} [")
    assert logits.tables(found[:1]) == {"logits": ""}


def test_whitening_leaves_pixels_and_makes_latents_plain():
    torch.manual_seed(0)
    model = Vae(VaeSpec(channels=32, channel_mult=(1, 1), num_res_blocks=1)).eval()
    images = torch.rand(24, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        before = model.decoder(model.post_quant_conv(model.posterior(images)[0]))
    vae.whiten(model, images)
    with torch.inference_mode():
        after = model.decode(model.encode(images).transpose(0, 1)[None])[0].transpose(0, 1)
        codes = model.encode(images).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(codes.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(codes.T.cov(), torch.eye(4), atol=2e-3, rtol=0)


def test_packed_weights_are_read_as_any_converted_ones(tmp_path):
    spec = model_named("mini")
    text = TextTower(spec.text)
    for parameter in text.parameters():  # its attention and positions are drawn by the training, not by the layer
        torch.nn.init.zeros_(parameter)
    pack(spec, UNet(spec.unet), Vae(spec.vae), text, tmp_path / "mini")
    manifest = read_manifest(tmp_path / "mini", WEIGHTS)
    assert manifest["vocabulary"] == captions.vocabulary()
    assert {path.name for path in (tmp_path / "mini").iterdir()} == {"manifest.json", "model.safetensors"}


@pytest.mark.slow
def test_training_makes_weights_that_the_engine_loads_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "HELD_OUT", range(10_000_000, 10_000_004))
    monkeypatch.setattr(vae, "WHITEN_FRAMES", 64)
    words = [str(tmp_path), "--clips", "16", "--scale", "0.001"]
    train.main(words)
    losses = [json.loads(line)["loss"] for part in loop.STEPS for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    right = json.loads((tmp_path / "probe.json").read_text())
    assert set(right) == {"rendered", "decoded"}
    assert all(set(shares) == set(probe.SEEN) for shares in right.values())
    assert all(0 <= share <= 1 for shares in right.values() for share in shares.values())
    frames = Engine.load("mini", weights=tmp_path / "mini").generate("winter", 4, sampling=Sampling(steps=2)).frames
    assert frames.shape == (4, 96, 128, 3)
    read = measures.measure(probe.load(tmp_path / "probe.safetensors"), stories.STORIES[0], frames)
    assert 0 <= read["stated"] <= 1

    def trained_again(*_):
        raise AssertionError("a finished part was trained again")

    monkeypatch.setattr(loop.Loop, "update", trained_again)
    (tmp_path / "probe.json").unlink()
    train.main(words)
    assert json.loads((tmp_path / "probe.json").read_text()) == right
