"""A wrong number fails by number, a changed file by checksum, an unreadable folder by a sentence."""

import hashlib
import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from vstar_engine.commands.main import main
from vstar_engine.networks.unet import UNet
from vstar_engine.verification import streaming_judges
from vstar_engine.verification.blend_judges import BLEND_KINDS
from vstar_engine.verification.case import Judge
from vstar_engine.verification.golden import Golden
from vstar_engine.verification.judges import KINDS
from vstar_engine.verification.verify import NOT_KNOWN, verify

STREAMING = GOLDEN.parent / "golden_streaming"
# one case of each kind, and every output of it that is judged
JUDGED = {
    "tar_f16_std1": ["out", "probs"],
    "tar_full_l0_f16": ["out", "out_sum", "out_sq", "q_head"],
    "tt_linear_w8": ["out_plain", "out_tar0", "out_tar1", "out_tar2"],
    "block_res": ["out"],
    "block_tconv": ["out"],
    "unet_batch2_plain": ["out"],
    "vsp": ["out.0", "out.17", "out.21", "index_table"],
    "ddim": [
        "ddpm.betas",
        "s25.eta1.ddim_sigmas",
        "s30.eta1.ddim_scale_arr_prev",
        "t25_eta1_cfg12.x",
        "t25_eta1_from10.pred_x0",
        "t25_eta0_cfg1.out",
    ],
    "vae_tiny": ["frames", "post_mean", "post_logvar", "z_encoded"],
    "text_encoder": ["tokens", "embeddings"],
    "e2e": ["embedding", "embedding_uncond", "x", "pred_x0_last", "latents", "frames", "eps_cond", "eps_uncond", "frames_u8"],
}
# what these cases store that is no output: what outputs are computed from, and evidence; weights beside
INPUTS = {
    "tar_f16_std1": "q k v",
    "tar_full_l0_f16": "pos q_head",
    "tt_linear_w8": "x",
    "block_res": "x emb",
    "block_res_small_signal": "x emb",
    "block_tconv": "x",
    "unet_batch2_plain": "x timesteps context fps trace",
    "vsp": "anchors.* out.16",  # more anchors than frames
    "ddim": "*.x_T *.c *.u *.noise",
    "vae_tiny": "z px post_noise",
    "text_encoder": "last_layer_2",
    "e2e": "x_T noise",
}
# the axis of the frames in outputs that have one
FRAME_AXIS = {
    "tar_f16_std1": {"out": 1, "probs": 1},
    "tt_linear_w8": {"out_plain": 2, "out_tar0": 2, "out_tar1": 2, "out_tar2": 2},
    "block_res": {"out": 0},
    "block_tconv": {"out": 2},
    "unet_batch2_plain": {"out": 2},
    "vsp": {"out.0": 0, "out.1": 0},
    "ddim": {f"t25_eta1_cfg12.{name}": -3 for name in ("x", "pred_x0", "out")},
    "vae_tiny": {"frames": 2},
    "e2e": {
        "embedding": 0,
        **dict.fromkeys(("eps_cond", "eps_uncond", "x", "pred_x0_last", "latents", "frames"), -3),
        "frames_u8": 0,
    },
}
NAMED, OTHERS = [2, 0], [0, 2]
COSTLY = ("tar_full_l0_f16", "ddim", "e2e")


def folder_of(tmp_path, name):
    """Copies one case, with the weights it names, to a folder of its own."""
    whole = Golden(GOLDEN)
    cases = [case for case in whole.cases if case["name"] in (name, whole.case(name).get("weights"))]
    for case in cases:
        shutil.copy(GOLDEN / case["file"], tmp_path)
    rewrite(tmp_path, cases)
    return tmp_path


def rewrite(folder, cases):
    (folder / "manifest.json").write_text(json.dumps({"cases": cases}))


def verdict(folder, name):
    return next(row for row in verify(Golden(folder)) if row.name == name)


def scale(folder, name, output, factor, rehash):
    golden = Golden(folder)
    case = golden.case(name)
    path = folder / case["file"]
    tensors = load_file(path)
    kind = tensors[output].dtype
    tensors[output] = np.ascontiguousarray((tensors[output] * factor).astype(kind))
    save_file(tensors, path)
    if rehash:
        case["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        rewrite(folder, golden.cases)


def store(folder, name, change):
    """Changes a case's tensors and has the manifest describe them."""
    golden = Golden(folder)
    case = golden.case(name)
    tensors = load_file(folder / case["file"])
    change(tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / case["file"])
    case["sha256"] = hashlib.sha256((folder / case["file"]).read_bytes()).hexdigest()
    rewrite(folder, golden.cases)


def outputs_of(name):
    inputs = ["w.*", *INPUTS[name].split()]
    stored = load_file(GOLDEN / Golden(GOLDEN).case(name)["file"])
    return [key for key in stored if not any(fnmatch(key, pattern) for pattern in inputs)]


def judged(folder, name):
    """Returns which outputs of a case are judged; all must agree."""
    golden = Golden(folder)
    judge = Judge(golden, golden.case(name), torch.device("cpu"))
    with torch.no_grad():
        KINDS[judge.case["kind"]](judge)
    assert all(finding.ok for finding in judge.findings)
    return {finding.output for finding in judge.findings}


def grouped(name):
    """Returns one output of each sort, where many runs have the same."""
    every = outputs_of(name)
    if name == "vsp":
        return ["out.0", "out.21", "index_table"]
    if name == "ddim":
        sorts = {output.split(".")[-1]: output for output in every}
        return [*sorts.values(), "s30.eta1.timesteps"]
    return every


def without(*outputs):
    def drop(tensors):
        for output in outputs:
            del tensors[output]

    return drop


def one_by_one(outputs):
    """Returns each name with each of its outputs; of those that take seconds to judge all but the first and last are slow."""
    return [
        pytest.param(name, output, marks=[pytest.mark.slow] * (name in COSTLY and output not in (found[0], found[-1])))
        for name, found in outputs.items()
        for output in found
    ]


@pytest.mark.parametrize(("name", "output"), one_by_one({name: grouped(name) for name in INPUTS}))
def test_a_case_may_lack_any_output(tmp_path, name, output):
    """What is left is judged, all of it."""
    folder, every = folder_of(tmp_path, name), set(outputs_of(name))
    store(folder, name, without(output))
    if output == "s30.eta1.timesteps":  # the published spacing got another number of steps than it was asked for
        assert verdict(folder, name).note == f"the case stores no {output}, which its outputs are computed from"
    elif every == {output}:
        assert "stores no output" in verdict(folder, name).note
    else:
        assert judged(folder, name) == every - {output}


@pytest.mark.parametrize("name", INPUTS)
def test_a_case_without_outputs_is_an_error(tmp_path, capsys, name):
    folder, kind = folder_of(tmp_path, name), Golden(GOLDEN).case(name)["kind"]
    store(folder, name, without(*outputs_of(name)))
    row = verdict(folder, name)
    assert (row.ok, row.note) == (False, f"{name}.safetensors stores no output that a case of kind {kind} is judged by")
    assert main(["verify", str(folder)]) == 1
    assert row.note in capsys.readouterr().out


def test_every_kind_is_judged_in_part():
    assert {Golden(GOLDEN).case(name)["kind"] for name in INPUTS} == set(KINDS) - set(streaming_judges.KINDS) - set(BLEND_KINDS)


@pytest.mark.parametrize("name", FRAME_AXIS)
def test_outputs_are_judged_at_the_frames_that_are_named(tmp_path, name):
    folder = folder_of(tmp_path, name)

    def shorten(tensors):
        tensors["frames_idx"] = np.array(NAMED)
        for output in outputs_of(name):
            if output in FRAME_AXIS[name]:
                tensors[output] = tensors[output].take(NAMED, FRAME_AXIS[name][output])

    store(folder, name, shorten)
    assert judged(folder, name) == set(outputs_of(name))
    store(folder, name, lambda tensors: tensors.update(frames_idx=np.array(OTHERS)))
    assert not verdict(folder, name).ok
    store(folder, name, lambda tensors: tensors.update(frames_idx=np.array([0, 1000])))
    assert "frames_idx must lie within 0 to" in verdict(folder, name).note


def test_frames_of_a_batch_of_rows(tmp_path):
    """(batch * frames) rows: the named frames of each video."""
    name = "block_res_small_signal"
    folder, frames = folder_of(tmp_path, name), Golden(GOLDEN).case(name)["config"]["frames"]

    def shorten(tensors):
        out = tensors["out"].reshape(2, frames, *tensors["out"].shape[1:])
        tensors["out"], tensors["frames_idx"] = out[:, NAMED].reshape(-1, *out.shape[2:]), np.array(NAMED)

    store(folder, name, shorten)
    assert verdict(folder, name).ok
    store(folder, name, lambda tensors: tensors.update(frames_idx=np.array(OTHERS)))
    assert not verdict(folder, name).ok


@pytest.mark.parametrize("dropped", [(), ("out_frames",), ("out_frame_sq",)], ids=str)
def test_a_network_is_judged_by_its_frames_and_their_squares(tmp_path, dropped):
    name = "unet_batch2_plain"
    folder = folder_of(tmp_path, name)

    def summarise(tensors):
        out = tensors.pop("out")
        squares = (out.astype(np.float64) ** 2).sum(axis=(0, 1, 3, 4)).astype(np.float32)
        tensors |= {"out_frames": out[:, :, NAMED], "frames_idx": np.array(NAMED), "out_frame_sq": squares}
        without(*dropped)(tensors)

    store(folder, name, summarise)
    assert judged(folder, name) == {"out_frames", "out_frame_sq"} - set(dropped)
    store(folder, name, without("frames_idx"))  # names the frames of out_frames alone
    missing = verdict(folder, name)
    assert missing.ok == ("out_frames" in dropped)
    assert missing.ok or missing.note == "the case stores no frames_idx, which its outputs are computed from"


def test_rows_of_an_attention_that_are_named(tmp_path):
    folder = folder_of(tmp_path, "tar_full_l0_f16")
    store(folder, "tar_full_l0_f16", without("out_sum", "out_sq"))
    assert judged(folder, "tar_full_l0_f16") == {"out"}
    store(folder, "tar_full_l0_f16", lambda tensors: tensors.update(pos=tensors["pos"][::-1]))
    assert not verdict(folder, "tar_full_l0_f16").ok


@pytest.mark.parametrize(
    ("name", "lacking"), [("vae_tiny", "px"), ("e2e", "x_T"), ("ddim", "t25_eta1_cfg12.u"), ("vsp", "anchors.3")]
)
def test_an_output_whose_input_is_missing_is_an_error(tmp_path, name, lacking):
    folder = folder_of(tmp_path, name)
    store(folder, name, without(lacking))
    assert verdict(folder, name).note == f"the case stores no {lacking}, which its outputs are computed from"


def test_what_needs_no_input_is_judged_without(tmp_path):
    """A video's beginning needs no noise, its decoding no picture."""
    folder = folder_of(tmp_path, "e2e")
    kept = ("embedding", "embedding_uncond")
    store(folder, "e2e", without(*[key for key in load_file(GOLDEN / "e2e.safetensors") if key not in kept]))
    assert judged(folder, "e2e") == set(kept)


def test_a_tolerance_of_its_own(tmp_path):
    folder = folder_of(tmp_path, "block_tconv")
    case = Golden(folder).case("block_tconv")
    rewrite(folder, [{**case, "tolerance": {"out": 1e-12}}])
    row = verdict(folder, "block_tconv")
    assert (row.ok, row.worst.tolerance) == (False, 1e-12)


@pytest.mark.parametrize(("name", "output"), one_by_one(JUDGED))
def test_scaled_output_fails_by_number(tmp_path, name, output):
    folder = folder_of(tmp_path, name)
    whole_numbers = output in ("tokens", "index_table", "frames_u8")
    scale(folder, name, output, 2 if whole_numbers else 1.001, rehash=True)
    row = verdict(folder, name)
    assert not row.ok
    assert row.worst is not None
    assert row.worst.output == output
    assert row.worst.error > row.worst.tolerance


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("unet_batch2_plain", lambda table: replace(table, rows=1.01 * table.rows)),
        ("e2e", lambda table: replace(table, rows=table.rows.roll(1, 0))),
    ],
    ids=["forward", "steps"],
)
def test_what_the_engine_projects_ahead_is_judged(tmp_path, monkeypatch, name, spoil):
    """The network is called plainly too, which does not hide a fault in what a step is made of."""
    made = UNet.timestep_table
    folder = folder_of(tmp_path, name)
    assert verdict(folder, name).ok
    monkeypatch.setattr(UNet, "timestep_table", lambda self, *given: spoil(made(self, *given)))
    assert not verdict(folder, name).ok


def test_altered_file_fails_by_checksum(tmp_path):
    folder = folder_of(tmp_path, "block_tconv")
    scale(folder, "block_tconv", "out", 1.001, rehash=False)
    row = verdict(folder, "block_tconv")
    assert not row.ok
    assert "sha256" in row.note


def test_altered_weights_fail_the_cases_that_use_them(tmp_path):
    folder = folder_of(tmp_path, "unet_batch2_plain")
    scale(folder, "tiny_model", "betas", 1.001, rehash=False)
    assert "tiny_model.safetensors has another sha256" in verdict(folder, "unet_batch2_plain").note


def test_nan_fails(tmp_path):
    folder = folder_of(tmp_path, "block_tconv")
    scale(folder, "block_tconv", "out", np.nan, rehash=True)
    assert not verdict(folder, "block_tconv").ok


def test_a_missing_file_fails_whether_or_not_its_kind_is_known(tmp_path, capsys):
    folder = folder_of(tmp_path, "block_tconv")
    case = Golden(folder).case("block_tconv")
    (folder / case["file"]).unlink()
    for kind in ("block", "riddle"):
        rewrite(folder, [{**case, "kind": kind}])
        assert "missing" in verdict(folder, "block_tconv").note
        assert main(["verify", str(folder)]) == 1


def test_kinds_that_are_not_known_fail_only_where_that_is_asked_for(tmp_path, capsys):
    folder = tmp_path / "riddles"
    shutil.copytree(STREAMING, folder)
    cases = [{**case, "kind": f"riddle of {case['kind']}"} for case in Golden(STREAMING).cases]
    rewrite(folder, cases)
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.count(f"-      {NOT_KNOWN}\n") == len(cases)
    assert said.endswith(f"0 of 0 cases agree with {folder}; {len(cases)} more are of kinds {NOT_KNOWN}\n")
    assert main(["verify", str(folder), "--strict"]) == 1
    shutil.copy(GOLDEN / "block_tconv.safetensors", folder)
    rewrite(folder, [*cases, Golden(GOLDEN).case("block_tconv")])
    capsys.readouterr()
    assert main(["verify", str(folder), "--json"]) == 0
    assert [json.loads(line)["ok"] for line in capsys.readouterr().out.splitlines()] == [*[None] * len(cases), True]
    assert main(["verify", str(folder), "--strict"]) == 1
    scale(folder, "block_tconv", "out", 1.001, rehash=True)
    assert main(["verify", str(folder)]) == 1


def test_strict_is_no_harder_on_kinds_that_are_known(tmp_path):
    assert main(["verify", str(folder_of(tmp_path, "block_tconv")), "--strict"]) == 0


def test_an_altered_file_of_a_kind_that_is_not_known_fails(tmp_path):
    shutil.copytree(STREAMING, tmp_path / "streaming")
    rewrite(tmp_path / "streaming", [{**Golden(STREAMING).case("mawe_ties"), "kind": "riddle"}])
    path = tmp_path / "streaming" / "mawe_ties.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert verdict(tmp_path / "streaming", "mawe_ties").ok is False
    assert main(["verify", str(tmp_path / "streaming")]) == 1


def test_command_prints_a_row_per_case_and_its_exit_code_tells(tmp_path, capsys):
    folder = folder_of(tmp_path, "block_tconv")
    assert main(["verify", str(folder)]) == 0
    assert "block_tconv" in capsys.readouterr().out
    scale(folder, "block_tconv", "out", 1.001, rehash=True)
    assert main(["verify", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    "content",
    [None, "not json", "[]", "{}", '{"cases": {}}', '{"cases": [{"name": "block_tconv"}]}'],
    ids=["absent", "text", "list", "no cases", "no list", "no kind"],
)
def test_folder_that_is_no_golden_folder(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert main(["verify", str(tmp_path)]) == 2
    assert "golden" in capsys.readouterr().err
