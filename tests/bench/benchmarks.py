"""The small regression suite: `pytest tests/bench/benchmarks.py` times what must not get slower, in a minute.

`make bench` writes it to out/bench/regression.json; `pytest-benchmark compare` and `--benchmark-compare-fail` read such files.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vstar_engine.bench.harness.random_networks import relative_error
from vstar_engine.bench.ops.attention_providers import Problem, ours
from vstar_engine.bench.step import stages
from vstar_engine.bench.step.ladder import ENGINE, Step
from vstar_engine.bench.step.workload import ERROR_BUDGET, Workload
from vstar_engine.kernels.temporal_attention import temporal_attention_ref

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scene() -> Workload:
    return Workload("mini", 16, (96, 128), torch.float32, CPU)


def measured(benchmark: Any, call: Callable[[], object]) -> object:
    with torch.no_grad():
        return benchmark.pedantic(call, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("frames", [16, 64, 128])
def test_temporal_attention(benchmark: Any, frames: int) -> None:
    problem = Problem.random((1, frames, 640, 5, 64), torch.float32, CPU, "fused", 1.0)
    answer = measured(benchmark, ours(problem))
    exact = temporal_attention_ref(problem.q[:, :, :4], problem.k[:, :, :4], problem.v[:, :, :4], problem.g)
    assert relative_error(answer[:, :, :4], exact) <= ERROR_BUDGET[torch.float32]


@torch.no_grad()
def test_guided_step(benchmark: Any, workload: Workload) -> None:
    answer = measured(benchmark, Step(workload).call(ENGINE))
    assert relative_error(answer, workload.wanted) <= ERROR_BUDGET[torch.float32]


@pytest.mark.parametrize("name", ["text", "sampler", "decode"])
@torch.no_grad()
def test_stage(benchmark: Any, workload: Workload, name: str) -> None:
    contest = stages.sampler(workload, 25) if name == "sampler" else getattr(stages, name)(workload)
    provider = contest.providers[0]
    answer = measured(benchmark, provider.prepare())
    assert contest.error(provider.name, answer) <= contest.budget
