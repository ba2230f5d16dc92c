"""Every launch-table entry compiles for every architecture without a GPU, and what would run badly is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from vstar_engine.config.models import MODELS
from vstar_engine.kernels.aot.attention_entries import Entry, entries
from vstar_engine.kernels.aot.compilation import attempt, faults
from vstar_engine.kernels.aot.frame_entries import frame_entries
from vstar_engine.kernels.aot.fused_entries import CHANNELS, CONVOLVED, E4M3, GROUPS, INNER, WIDTHS, FusedEntry, fused_entries
from vstar_engine.kernels.aot.report import page, programs
from vstar_engine.kernels.gpu.temporal_attention_launch import ARCHITECTURES, DTYPES, HEAD_DIMS, Config, config
from vstar_engine.networks import fp8
from vstar_engine.networks.layers import GEGLU, Linear, Norm, RowNorm
from vstar_engine.networks.unet import UNet
from vstar_engine.networks.vae import Vae

ROOT = Path(__file__).parents[2]


def compile_table(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vstar_engine.kernels.aot", "--out", str(out), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# an Ampere and a Hopper GPU, whose tensor cores and loads are unlike: each takes half a minute
ARCHS = [80, 90]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The folder of ARCHS at head_dim 64 in fp16."""
    out = tmp_path_factory.mktemp("aot")
    done = compile_table(out, "--arch", ",".join(map(str, ARCHS)), "--head-dim", "64", "--dtype", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture
def compiled_everywhere(compiled, tmp_path):
    """The folder of all architectures at head_dim 64 in fp16."""
    out = shutil.copytree(compiled, tmp_path / "aot")
    done = compile_table(out, "--head-dim", "64", "--dtype", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_entry_has_its_artifact(compiled):
    check_artifacts(compiled, ARCHS)


@pytest.mark.slow
def test_every_entry_of_every_architecture_has_its_artifact(compiled_everywhere):
    check_artifacts(compiled_everywhere, list(ARCHITECTURES))


def check_artifacts(compiled, archs):
    manifest = json.loads((compiled / "manifest.json").read_text())
    records = {record["name"]: record for record in manifest["entries"]}
    wanted = [*entries(archs, [64], ["fp16"]), *fused_entries(archs, ["fp16"]), *frame_entries(archs, ["fp16"])]
    assert manifest["faults"] == []
    assert set(records) == {entry.name for entry in wanted}
    for record in records.values():
        cubin = (compiled / record["cubin"]).read_bytes()
        assert cubin[:4] == b"\x7fELF"
        assert hashlib.sha256(cubin).hexdigest() == record["cubin_sha256"]
        assert f".target {record['target']}" in (compiled / record["ptx"]).read_text()
        assert record["registers"] <= 255
        assert record["warps"] == {entry.name: entry.warps for entry in wanted}[record["name"]]


@pytest.mark.slow
def test_the_page_is_what_was_compiled(compiled_everywhere):
    manifest = json.loads((compiled_everywhere / "manifest.json").read_text())
    written = (ROOT / "docs" / "performance" / "compiled_kernels.md").read_text()
    if f"\nTriton {manifest['triton']} " not in written:
        pytest.skip(f"the page is of another Triton than {manifest['triton']}, the one here")
    assert page(manifest) == written, "write it anew: `python -m vstar_engine.kernels.aot --report DIR`"


def test_a_page_is_of_one_dtype(compiled):
    manifest = json.loads((compiled / "manifest.json").read_text())
    assert "sm_90" in page(manifest)
    with pytest.raises(ValueError, match="one dtype, and the manifest has none: compile with --dtype fp16"):
        page({**manifest, "entries": []})


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "fit"),
    [
        (90, 4, 125, 0, 4),  # 128 registers a thread are a quarter of all
        (90, 4, 129, 0, 3),
        (80, 1, 32, 4096, 32),  # no more programs than that
        (86, 1, 32, 4096, 16),
        (86, 1, 32, 32 * 1024, 3),  # and 1 KiB each besides
        (120, 8, 32, 0, 6),  # 48 warps
    ],
)
def test_programs_of_a_multiprocessor(arch, warps, registers, shared, fit):
    assert programs({"arch": arch, "warps": warps, "registers": registers, "shared": shared}) == fit


def test_padded_heads_do_not_spill_on_sm_80(compiled, tmp_path):
    """Kernels that know no head width are there already, and are taken as they are."""
    out = shutil.copytree(compiled, tmp_path / "aot")
    done = compile_table(out, "--arch", "80", "--head-dim", "40", "--dtype", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_whole_table(tmp_path):
    done = compile_table(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_whole_records_are_reused_and_damaged_ones_are_not(compiled):
    options = ("--arch", "80", "--head-dim", "64", "--dtype", "fp16")
    first, second = sorted(compiled.glob("*_sm80_*.cubin"))[:2]
    first.write_bytes(b"damaged")
    before = second.stat().st_mtime_ns
    done = compile_table(compiled, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert first.read_bytes()[:4] == b"\x7fELF"
    assert second.stat().st_mtime_ns == before


SOUND = Entry(90, "fp16", 64, config(64, 64, 64, "fp16", 90), even=True, dense=False)
FAULTS = {
    "spills": ({"spills": 3, "stack": 16}, "spills: 3 local loads and stores, 16 bytes of stack"),
    "shared": ({"shared": 240_000}, "needs 240000 bytes of shared memory where sm_90 has 232448"),
    "scratch": ({"scratch": 64}, "64 bytes of scratch"),
    "parameters": ({"hidden_parameters": -1}, "the launcher gives none"),
    "no tensor core": ({"tensor_core": []}, "claims HGMMA but holds no tensor-core instruction"),
    "lesser tensor core": ({"tensor_core": ["HMMA"]}, r"claims HGMMA but holds \['HMMA'\]"),
    "narrow loads": ({"loads_128": 8, "loads_32": 48}, "less than 128 bits at a time: 8 of 128 bits, 48 of 32"),
    "16-bit loads": ({"loads_other": ["LDG.E.U16"]}, "loads its tiles through less than 128 bits at a time"),
    "narrow stores": ({"stores_128": 3, "stores_32": 4}, "stores its tile through less than 128 bits at a time: 3 of 128 bits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence(fault, compiled):
    record = json.loads(next(compiled.glob(f"{SOUND.name}_*.json")).read_text())
    assert faults(SOUND, record) == []
    change, sentence = FAULTS[fault]
    (said,) = faults(SOUND, {**record, **change})
    assert said.startswith(SOUND.name)
    assert re.search(sentence, said)


def test_a_spilling_row_is_found(tmp_path):
    """128 frames in a single stage of eight warps: more than an sm_80's registers."""
    entry = Entry(80, "fp16", 64, Config(128, 128, warps=8), even=False, dense=False)
    record = attempt(entry, tmp_path)
    assert isinstance(record, dict)
    assert any("spills" in sentence for sentence in faults(entry, record))


def test_what_does_not_compile_has_no_artifact(tmp_path):
    entry = Entry(80, "fp16", 64, Config(48, 48, warps=4), even=False, dense=False)
    said = attempt(entry, tmp_path)
    assert isinstance(said, str)
    assert said.startswith(f"{entry.name} has no artifact: CompilationError")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(("--arch", "75"), "unknown [75]"), (("--dtype", "fp8"), "unknown ['fp8']"), (("--head-dim", "200"), "between 1 and 128")],
)
def test_unknown_options_are_refused(options, sentence, tmp_path):
    done = compile_table(tmp_path, *options)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_names_tell_entries_apart():
    names = [entry.name for entry in entries(list(ARCHITECTURES), list(HEAD_DIMS), list(DTYPES))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("op", E4M3)
def test_what_takes_e4m3_is_compiled_where_there_is_such_a_number(op):
    archs = {entry.arch for entry in fused_entries(list(ARCHITECTURES), ["fp16"]) if entry.op == op}
    assert archs == {89, 90, 100, 120}


WHOLE = {"spills": 0, "stack": 0, "local": 0, "shared": 0, "hidden_parameters": 0, "scratch": 0, "tensor_core": ["HGMMA"]}
NARROW = {"loads_32": 8, "loads_other": [], "stores_32": 4, "stores_other": []}
ENTRIES = {entry.name: entry for entry in fused_entries([90], ["fp16"])}
# with the least that each must load and store: two halves of a block in and one out; a tile, the parts of both factors of its
# sum, and the residual; a tile, and the parts of both factors, which are bytes; or the input and the residual are not yet, or
# there are two weights, and the tile is bytes too; of a sampling step two predictions, and in float32 two tensors in and two
# out
SWEEPS = [
    (FusedEntry("geglu", 90, "fp16", (("BLOCK", 1024), ("EVEN", True)), 4, "block1024"), {"loads_128": 2, "stores_128": 1}),
    (ENTRIES["linear_128x128_bias_residual_fp16_sm90"], {"loads_128": 16, "stores_128": 8}),
    (ENTRIES["conv_e4m3_128x128x64_fp16_sm90"], {"loads_128": 4, "stores_128": 8, "tensor_core": ["QGMMA"]}),
    (
        ENTRIES["linear_e4m3_128x128x128_round_bias_residual_fp16_sm90"],
        {"loads_128": 20, "stores_128": 8, "tensor_core": ["QGMMA"]},
    ),
    (ENTRIES["linear_e4m3_128x128x64_bias_gate_then_fp16_sm90"], {"loads_128": 6, "stores_128": 4, "tensor_core": ["QGMMA"]}),
    (ENTRIES["guided_step_block_fp16_sm90"], {"loads_128": 6, "stores_128": 4}),
]
FUSED_FAULTS = {
    "gate loads": (0, {"loads_128": 0}, "geglu_block1024_fp16_sm90 loads x through less than 128 bits at a time: 0 of 128"),
    "gate stores": (0, {"stores_128": 0}, "geglu_block1024_fp16_sm90 stores through less than 128 bits at a time: 0 of 128"),
    "product loads": (1, {"loads_128": 15}, "linear_128x128_bias_residual_fp16_sm90 loads x through less than 128 bits"),
    "product stores": (1, {"stores_128": 7}, "linear_128x128_bias_residual_fp16_sm90 stores through less than 128 bits"),
    "no tensor core": (1, {"tensor_core": ["HMMA"]}, "linear_128x128_bias_residual_fp16_sm90 claims HGMMA but holds"),
    "convolution loads": (2, {"loads_128": 3}, "conv_e4m3_128x128x64_fp16_sm90 loads x through less than 128 bits"),
    "convolution stores": (2, {"stores_128": 7}, "conv_e4m3_128x128x64_fp16_sm90 stores through less than 128 bits"),
    "rounding loads": (3, {"loads_128": 19}, "linear_e4m3_128x128x128_round_bias_residual_fp16_sm90 loads x through less"),
    "rounding stores": (3, {"stores_128": 7}, "linear_e4m3_128x128x128_round_bias_residual_fp16_sm90 stores through less"),
    "gate loads in FP8": (4, {"loads_128": 5}, "linear_e4m3_128x128x64_bias_gate_then_fp16_sm90 loads x through less"),
    "gate stores in FP8": (4, {"stores_128": 3}, "linear_e4m3_128x128x64_bias_gate_then_fp16_sm90 stores through less"),
    "layer not in FP8": (
        4,
        {"tensor_core": ["HGMMA"]},
        "linear_e4m3_128x128x64_bias_gate_then_fp16_sm90 claims QGMMA but holds",
    ),
    "update loads": (5, {"loads_128": 5}, "guided_step_block_fp16_sm90 loads x through less than 128 bits at a time: 5 of 128"),
    "update stores": (5, {"stores_128": 3}, "guided_step_block_fp16_sm90 stores through less than 128 bits at a time: 3 of"),
    "not in FP8": (2, {"tensor_core": ["HGMMA"]}, "conv_e4m3_128x128x64_fp16_sm90 claims QGMMA but holds"),
}


@pytest.mark.parametrize("fault", FUSED_FAULTS)
def test_a_fault_of_a_fused_kernel_is_one_sentence(fault):
    which, change, words = FUSED_FAULTS[fault]
    entry, least = SWEEPS[which]
    assert faults(entry, {**WHOLE, **NARROW, **least}) == []
    (sentence,) = faults(entry, {**WHOLE, **NARROW, **least, **change})
    assert sentence.startswith(words)


def test_every_width_of_the_networks_norms_and_transformers_is_compiled():
    """The UNet's and the decoder's, as the networks say."""
    spec = MODELS["videocrafter2"]
    with torch.device("meta"):
        networks = [UNet(spec.unet), Vae(spec.vae, encoder=False)]
    modules = [module for network in networks for module in network.modules()]
    norms = {module.num_channels for module in modules if isinstance(module, Norm)}
    assert {module.num_groups for module in modules if isinstance(module, Norm)} == {GROUPS}
    assert norms == set(CHANNELS)
    assert {module.normalized_shape[0] for module in modules if isinstance(module, RowNorm)} == set(WIDTHS)
    assert {module.proj.out_features // 2 for module in modules if isinstance(module, GEGLU)} == set(INNER)
    small = [layer for layer in fp8.layers(networks[0]).values() if not isinstance(layer, Linear)]
    assert {layer.in_channels for layer in small if layer.kernel_size != (1, 1)} == set(CONVOLVED)
    sizes = {entry.case for entry in fused_entries([90], ["fp16"]) if entry.op == "groupnorm_silu_settle"}
    assert sizes == {f"size{channels // GROUPS}" for channels in norms}
