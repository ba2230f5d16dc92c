"""B4: others' tools against the server: LiteLLM's video calls, and AIPerf, which measures video servers."""

import json
import os
import subprocess

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support import scratch
from support.servers import HERE, Server

pytestmark = pytest.mark.slow

LITELLM, AIPERF = "litellm==1.110.2", "aiperf==0.13.0"
# AIPerf counts the words of prompts, and would fetch a tokenizer for it
TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(sys.argv[1])
"""


def run(*command, **environment):
    done = subprocess.run([*map(str, command)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_litellm(tmp_path):
    python = scratch.environment("litellm", LITELLM) / "python"
    with Server(tmp_path) as server:
        said = run(python, HERE / "litellm_conformance.py", server.url, LITELLM_LOCAL_MODEL_COST_MAP="True")
        facts = json.loads(said.splitlines()[-1])
        assert facts["ends"] == ["completed", "completed"]
        assert facts["content"] == "ftyp"
        assert facts["listed"] == 2
        first, again = sorted(server.ledger(), key=lambda video: video["remixed_from_video_id"] or "")
        assert facts["remix_of"] == again["remixed_from_video_id"] == first["id"]


def test_aiperf(tmp_path):
    tools = scratch.environment("aiperf", AIPERF)
    run(tools / "python", "-c", TOKENIZER, tmp_path / "words")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "aiperf"
    prompts.write_text("".join(json.dumps({"text": f"a meadow, {colour}"}) + "\n" for colour in ("red", "blue")))
    with Server(tmp_path) as server:
        what = ("--model", "mini", "--url", server.url, "--endpoint-type", "video-generation", "--download-video-content")
        asked = ("--input-file", prompts, "--custom-dataset-type", "single_turn", "--extra-inputs", "num_frames:4")
        load = ("--request-count", "6", "--concurrency", "2", "--tokenizer", tmp_path / "words", "--ui", "none")
        run(tools / "aiperf", "profile", *what, *asked, *load, "--artifact-dir", out)
        measured = json.loads((out / "profile_export_aiperf.json").read_text())
        assert measured["request_count"]["avg"] == 6
        assert not measured.get("error_summary")
        assert len(server.ledger()) == 6
