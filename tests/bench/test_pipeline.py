"""`bench pipeline`: every rung computes the same step, can be left out, and a planted fault is refused."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import profile as profiler

from vstar_engine.backends import eager
from vstar_engine.bench.__main__ import main
from vstar_engine.bench.harness.block_costs import count_flops
from vstar_engine.bench.harness.contest import NotHere, Pace, hold
from vstar_engine.bench.harness.random_networks import relative_error, seeded_unet, step_inputs
from vstar_engine.bench.harness.rows import ABSENT, OK, SKIPPED, WRONG, ResultFile, read
from vstar_engine.bench.report import tables
from vstar_engine.bench.step import fast_modes, ladder, precision_drift, profile, stages, whole_videos, workload
from vstar_engine.bench.step.ladder import (
    AOTI,
    BASELINE,
    CLEAN,
    COMPILE,
    COMPILED,
    DTYPE,
    ENGINE,
    GRAPH,
    HOISTED,
    IMPROVEMENTS,
    TENSORRT,
    Step,
)
from vstar_engine.bench.step.profile import PAGE, TRACE
from vstar_engine.bench.step.workload import ERROR_BUDGET, TINY, Workload
from vstar_engine.config.models import MODELS
from vstar_engine.config.sampling import Sampling
from vstar_engine.errors import DeviceError
from vstar_engine.kernels.cpu import library
from vstar_engine.networks.layers import CrossAttention
from vstar_engine.networks.vae import Vae
from vstar_engine.sampling import fp8_calibration
from vstar_engine.weights import checkpoint

CPU = torch.device("cpu")
EAGER = [name for name in IMPROVEMENTS if name not in {*COMPILED, GRAPH}]
PACE = Pace(rounds=1, warmup=0)


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return Workload("tiny", 5, TINY.size, torch.float32, CPU, compiler="eager")


def rungs(without: str = "") -> list[frozenset[str]]:
    names = [name for name in EAGER if name != without]
    return [frozenset(names[:i]) for i in range(len(names) + 1)]


@pytest.mark.parametrize(
    "features", dict.fromkeys([*rungs(), *rungs(CLEAN), BASELINE, ENGINE]), ids=lambda x: "+".join(sorted(x))
)
@torch.no_grad()
def test_every_rung_computes_the_step(tiny: Workload, features: frozenset[str]) -> None:
    answer = Step(tiny).call(features)()
    assert answer.shape == tiny.wanted.shape == (2, *tiny.inputs[0].shape[1:])
    assert relative_error(answer, tiny.wanted) <= ERROR_BUDGET[torch.float32]


@torch.no_grad()
def test_a_step_without_the_regulariser_is_far_off(tiny: Workload) -> None:
    plain = tiny.by_passes(tiny.unet(torch.float32, "contiguous"), lambda level: ladder.without_waste(None))
    assert relative_error(plain(*tiny.inputs), tiny.wanted) > 100 * ERROR_BUDGET[torch.float32]


@torch.no_grad()
def test_the_dtype_rung_changes_the_dtype(tiny: Workload) -> None:
    half = Workload("tiny", 3, TINY.size, torch.bfloat16, CPU)
    step = Step(half)
    assert step.call(frozenset({HOISTED}))().dtype == torch.float32
    assert step.call(frozenset({HOISTED, DTYPE}))().dtype == torch.bfloat16
    assert relative_error(step.call(ENGINE)(), half.wanted) <= ERROR_BUDGET[torch.bfloat16]


@torch.no_grad()
def test_text_kept_is_not_projected_again(tiny: Workload) -> None:
    call = Step(tiny)._forward(ENGINE, tiny.inputs)
    layers = [module for module in call.func.modules() if isinstance(module, CrossAttention)]
    assert set(call.args[2].kv) == set(layers)
    for layer in layers:
        layer.to_kv = None
    assert relative_error(call(), tiny.wanted) <= ERROR_BUDGET[torch.float32]


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_rung_is_traced_in_one_piece(tiny: Workload) -> None:
    torch.compiler.reset()
    for features in (ENGINE | {COMPILE}, BASELINE | {COMPILE}):
        answer = Step(tiny).call(features)()
        assert relative_error(answer, tiny.wanted) <= ERROR_BUDGET[torch.float32]


@pytest.mark.slow
@torch.no_grad()
def test_the_packaged_step_computes_the_same(tiny: Workload) -> None:
    step = Step(replace(tiny, compiler="inductor"))
    answer = step.call(ENGINE | {AOTI})()
    assert relative_error(answer, tiny.wanted) <= ERROR_BUDGET[torch.float32]
    facts = step.packages[ENGINE | {AOTI}]
    assert facts["build"] > 0
    assert facts["package_bytes"] > 10_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_graph_needs_a_gpu(tiny: Workload) -> None:
    with pytest.raises(NotHere, match="needs a GPU"):
        Step(tiny).call(ENGINE | {GRAPH})


def test_a_rung_left_out_is_left_out(tiny: Workload) -> None:
    names = [provider.name for provider in Step(tiny).ladder(without=[CLEAN, COMPILE]).providers]
    assert names[:3] == ["published, with preview", "published", f"+ {HOISTED}"]
    assert f"+ {CLEAN}" not in names
    features = {provider.name: provider.facts["features"] for provider in Step(tiny).ladder(without=[CLEAN]).providers[1:]}
    assert all(CLEAN not in found for name, found in features.items() if name.startswith("+"))
    assert set(features[f"or {AOTI}"]) == ENGINE | {AOTI}
    assert f"or {TENSORRT}" not in [provider.name for provider in Step(tiny).ladder(without=[TENSORRT]).providers]
    assert GRAPH in features[f"+ {GRAPH}"]


@torch.no_grad()
def test_a_spoiled_kernel_is_refused(tiny: Workload, tmp_path: Path) -> None:
    step = Step(tiny)
    real = step.call(ENGINE)
    step.built[ENGINE] = lambda: 1.001 * real()
    with ResultFile(tmp_path / "rows.jsonl", "test") as rows:
        hold(step.headline(COMPILED), rows, PACE)
    found = {row.provider: row.status for row in read([tmp_path / "rows.jsonl"])}
    assert (found["ours"], found["clean eager"], found["published"]) == (WRONG, OK, OK)
    assert found["ours, CUDA graph"] == SKIPPED


def test_stages_sum_to_a_whole_video(tiny: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, "test") as rows:
        stages.measure(tiny, Step(tiny), 4, rows, PACE)
    table = {(row.case["part"], row.provider): row.numbers for row in read([path])}
    parts = {
        name: table["stages", name]["median"] for name in (stages.STEP, stages.TEXT, stages.SAMPLER, stages.DECODE, stages.MP4)
    }
    theirs = {name: table["stages", f"{name}, published"]["median"] for name in (stages.STEP, stages.TEXT, stages.DECODE)}
    assert table["stages", f"{stages.STEP}, published"]["features"] == []
    for path, taken in ((stages.OURS, parts), (stages.PUBLISHED, parts | theirs)):
        whole = table["whole", path]
        assert whole["includes"] == list(parts)
        assert whole["seconds of UNet step"] == pytest.approx(4 * taken[stages.STEP])
        assert whole["median"] == pytest.approx(sum(taken.values()) + 3 * taken[stages.STEP])
    for name in (stages.STEP, stages.TEXT, stages.DECODE):
        assert table["stages", name]["floor"] > 0


@pytest.mark.skipif(not library.status()[0], reason=f"needs the CPU kernel: {library.status()[1]}")
@torch.no_grad()
def test_the_decoder_is_laid_out_as_the_engine_loads_it(tiny: Workload) -> None:
    """So its norms see channels-last memory and are fused; the published path's are PyTorch's, on contiguous memory."""
    loaded = Vae(TINY.vae, encoder=False)
    checkpoint.load(loaded, dict(stages.decoder(tiny).state_dict()), "")
    ours, published = (stages.decoder(tiny, path) for path in (stages.OURS, stages.PUBLISHED))
    strides = {name: parameter.stride() for name, parameter in ours.named_parameters()}
    assert strides == {name: parameter.stride() for name, parameter in loaded.named_parameters()}
    latents = torch.randn(1, 4, 2, 4, 4)
    found = {}
    for name, vae in (("loaded", loaded), ("ours", ours), ("published", published)):
        norms = [module for module in vae.modules() if isinstance(module, torch.nn.GroupNorm)]
        with profiler() as seen:
            vae.decode(latents)
        found[name] = {event.key: event.count for event in seen.key_averages()}
        assert found[name].get("vstar::groupnorm_silu", 0) == (0 if name == "published" else len(norms))
        assert found[name].get("aten::native_group_norm", 0) == (len(norms) if name == "published" else 0)


def test_a_missing_mp4_library_is_a_row(tiny: Workload, tmp_path: Path, modules: Callable) -> None:
    modules({"av": None})
    with ResultFile(tmp_path / "rows.jsonl", "test") as rows:
        hold(stages.encode(tiny, tmp_path), rows, PACE)
    assert read([tmp_path / "rows.jsonl"])[0].status == ABSENT


def test_the_trajectory_follows_float64_and_sees_a_missing_regulariser(tiny: Workload, tmp_path: Path) -> None:
    with ResultFile(tmp_path / "rows.jsonl", "test") as rows:
        precision_drift.measure(tiny, 3, rows, PACE)
    (row,) = read([tmp_path / "rows.jsonl"])
    assert len(row.numbers["cosine"]) == len(row.numbers["psnr"]) == 3
    assert row.numbers["last_cosine"] > 0.99999
    assert row.numbers["last_psnr"] > 80
    assert row.case["weights"] == "seeded"


def test_cosine_and_psnr() -> None:
    x = torch.tensor([0.0, 3.0, 4.0])
    assert precision_drift.cosine(2 * x, x) == pytest.approx(1)
    assert precision_drift.psnr(x, x) == 200
    assert precision_drift.psnr(x + 0.4, x) == pytest.approx(20)


def test_weights_are_trained_where_they_come_with_the_package() -> None:
    spec = MODELS["mini"]
    trained, seeded = workload.trained_unet(spec, CPU, torch.float32), seeded_unet(spec.unet, CPU, torch.float32)
    assert not torch.equal(trained.out[2].weight, seeded.out[2].weight)


@pytest.mark.parametrize(("frames", "tflop"), [(16, 12.58), (64, 50.54)])
def test_flops_of_the_full_network(frames: int, tflop: float) -> None:
    spec = MODELS["videocrafter2"]
    latents, timestep, context, *rest = step_inputs(spec, spec.size, frames, "cpu", torch.float16)
    one = count_flops(spec.unet, [latents, timestep, context[:1], *rest])
    assert one["whole"] / 1e12 == pytest.approx(tflop, rel=5e-4)
    counted = count_flops(spec.unet, [latents, timestep, context, *rest])
    assert 1.9 < counted["whole"] / one["whole"] < 1.98
    assert sum(counted.values()) == pytest.approx(2 * counted["whole"])
    assert all(part > 0 for part in counted.values())


def test_a_seed_gives_the_same_weights_and_a_finite_forward() -> None:
    spec = MODELS["mini"]
    first, second, other = (seeded_unet(spec.unet, "cpu", torch.float32, seed) for seed in (0, 0, 1))
    weights = [unet.middle_block[0].in_layers[2].weight for unet in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    out = first(*step_inputs(spec, (32, 32), 2, "cpu", torch.float32))
    assert out.isfinite().all()
    assert 0.1 < out.std() < 10


def test_what_fast_saves_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device, dtype: torch.dtype) -> None:
        raise DeviceError("no FP8 here")

    monkeypatch.setattr(fast_modes.fp8, "check", refuse)
    path = tmp_path / "rows.jsonl"
    assert main(["pipeline", "--rehearse", "--parts", "fast", "--out", str(path)]) == 0
    found = {row.provider: row for row in read([path])}
    assert list(found) == list(fast_modes.OPTIONS)
    assert found.pop("fp8").note == "no FP8 here"
    assert {name: row.numbers["steps"] for name, row in found.items()} == {
        name: 4 if name == "few-step" else 2 for name in found
    }
    assert found["exact"].numbers["errors"] == [0, 0]
    assert found["step-cache"].numbers["errors"][0] == 0 < found["step-cache"].numbers["last_error"]
    few = found["few-step"].numbers["errors"]
    assert len(few) == 4
    assert few[-1] == pytest.approx(found["few-step"].numbers["last_error"], abs=1e-4)
    table = tables.fast(list(found.values()), False)[0]
    assert "| exact | **" in table
    assert f"({found['step-cache'].numbers['last_cosine']:.3f}) |" in table
    (way,) = tables.strays(list(found.values()), False)
    assert "| step | guidance-interval | step-cache | guidance-interval, step-cache |" in way
    walked = [found[name].numbers["errors"] for name in ("guidance-interval", "step-cache", "guidance-interval, step-cache")]
    for step in (0, 1):
        assert f"\n| {step + 1} | {' | '.join(f'{errors[step]:.3f}' for errors in walked)} |" in way
    assert way.endswith(f"finished latents strays from the exact run's last by {', '.join(f'{error:.3f}' for error in few)}.")


def test_every_option_replays_its_steps_as_a_video_on_a_gpu_does(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch, graphs: type
) -> None:
    """Walks over the stand-in for CUDA graphs: the same latents, and each kind of step replays from its second run on."""
    tiny = replace(tiny, frames=2)
    # calibration makes no step
    monkeypatch.setattr(fp8_calibration, "STEPS", 1)
    plain = fast_modes.walks(tiny, 8)
    monkeypatch.setattr(eager, "kind", lambda device: eager.RecordedUnet)
    recorded = fast_modes.walks(tiny, 8)
    replays = {}
    with torch.inference_mode():
        for option in fast_modes.OPTIONS:
            before = graphs.replays
            plain[option]()
            assert graphs.replays == before
            recorded[option]()
            assert all(map(torch.equal, recorded[option].runs[0], plain[option].runs[0]))
            replays[option] = graphs.replays - before
    # the first of 8 is plain; with the cache the first whole one and the first on its features; guided or not is met before
    assert replays == {
        "exact": 7,
        "guidance-interval": 7,
        "step-cache": 6,
        "guidance-interval, step-cache": 6,
        "fp8": 7,
        "few-step": 4,
    }


def test_a_walk_strays_by_its_mean_over_seeds() -> None:
    ones = torch.ones(1, 4)
    both = [[ones, ones], [ones, ones]], [[ones, 2 * ones], [ones, ones]]
    exact, ours = (fast_modes.Walk(None, None, None, Sampling(2), runs) for runs in both)
    assert ours.against(exact)["errors"] == [0, 0.5]
    assert ours.against(exact)["last_cosine"] == pytest.approx(1)
    few = fast_modes.Walk(None, None, None, Sampling.few(), [[ones, 2 * ones, 3 * ones], [ones, ones, -ones]])
    assert few.against(exact)["errors"] == [0, 0.5, 2]
    assert few.against(exact)["last_cosine"] == pytest.approx(0)


@pytest.mark.parametrize("option", fast_modes.OPTIONS)
def test_every_option_is_sampled_as_it_is_named(option: str) -> None:
    named = set(fast_modes.sampling(option, 25).fast)
    assert named == set() if option in ("exact", "fp8") else named == set(option.split(", "))


def test_a_profile_is_a_page_rows_and_a_trace(tiny: Workload, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with ResultFile(path, "vstar-engine bench pipeline --profile") as rows:
        profile.measure(tiny, Step(tiny), 1, tmp_path, rows)
    page = (tmp_path / PAGE).read_text()
    assert "| temporal_transformer |" in page
    assert "| `vstar::temporal_attention` |" in page
    assert "traceEvents" in json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))
    shares = {row.provider: row.numbers["share"] for row in read([path]) if row.case["part"] == "profile"}
    assert shares.pop("whole") == 1
    assert sum(shares.values()) == pytest.approx(1, abs=0.1)


def test_a_spent_budget_names_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert main(["pipeline", "--rehearse", "--budget", "0", "--out", str(path)]) == 0
    found = {(row.case["part"], row.status, row.note) for row in read([path])}
    assert found == {(part, SKIPPED, "0 s were left") for part in ("headline", "stages", "ladder", "ablation", "trajectory")}


def test_whole_videos_are_the_published_ones_but_for_the_lossy_option(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    small = ["--size", "32x32", "--frames", "3", "--steps", "4", "--rounds", "1", "--device", "cpu"]
    assert main(["pipeline", "--parts", "videos", *small, "--out", str(path)]) == 0
    found = {row.provider: row.numbers for row in read([path])}
    assert list(found) == list(whole_videos.PATHS)
    assert found["published"]["differing"] == 0
    assert all(found[name]["largest"] <= 1 for name in ("clean eager", "ours"))
    assert found["ours, --fast step-cache"]["largest"] > 1
    assert all(numbers["step"] * 4 < numbers["median"] and numbers["peak_bytes"] > 0 for numbers in found.values())


def test_whole_videos_want_weights(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert main(["pipeline", "--rehearse", "--parts", "videos", "--out", str(path)]) == 0
    (row,) = read([path])
    assert (row.status, row.note) == (SKIPPED, "whole videos take a model that comes with its weights, one of mini")
