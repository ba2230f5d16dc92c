"""A wrong number fails by number, a changed file by checksum, an unreadable folder by a sentence."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from vstar_engine.commands.main import main
from vstar_engine.networks.unet import UNet
from vstar_engine.verification.golden import Golden
from vstar_engine.verification.verify import verify

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


@pytest.mark.parametrize(("name", "output"), [(name, output) for name, outputs in JUDGED.items() for output in outputs])
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
        ("unet_batch2_plain", lambda clock: replace(clock, table=1.01 * clock.table)),
        ("e2e", lambda clock: replace(clock, table=clock.table.roll(1, 0))),
    ],
    ids=["forward", "steps"],
)
def test_what_the_engine_projects_ahead_is_judged(tmp_path, monkeypatch, name, spoil):
    """The network is called plainly too, which does not hide a fault in what a step is made of."""
    clock = UNet.clock
    folder = folder_of(tmp_path, name)
    assert verdict(folder, name).ok
    monkeypatch.setattr(UNet, "clock", lambda self, *given: spoil(clock(self, *given)))
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


def test_unknown_kind_and_missing_file_fail(tmp_path):
    folder = folder_of(tmp_path, "block_tconv")
    case = Golden(folder).case("block_tconv")
    rewrite(folder, [{**case, "kind": "riddle"}])
    assert "unknown kind" in verdict(folder, "block_tconv").note
    rewrite(folder, [case])
    (folder / case["file"]).unlink()
    assert "missing" in verdict(folder, "block_tconv").note


def test_command_prints_a_row_per_case_and_its_exit_code_tells(tmp_path, capsys):
    folder = folder_of(tmp_path, "block_tconv")
    assert main(["verify", str(folder)]) == 0
    assert "block_tconv" in capsys.readouterr().out
    scale(folder, "block_tconv", "out", 1.001, rehash=True)
    assert main(["verify", str(folder), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("content", [None, "not json", "[]", "{}"], ids=["absent", "text", "list", "no cases"])
def test_folder_that_is_no_golden_folder(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    assert main(["verify", str(tmp_path)]) == 2
    assert "golden" in capsys.readouterr().err
