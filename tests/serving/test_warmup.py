"""Warming up: every bucket goes through all stages, and a batch is used only where it pays."""

import pytest

from support import slow_engine
from vstar_engine import warmup as warm_stages
from vstar_engine.serving.workers.step_times import StepTimes
from vstar_engine.serving.workers.warmup import warm

BUCKETS = [(8, 32, 64), (16, 32, 64)]


class Timed(slow_engine.Slow):
    """Steps take no time; the clock is moved on by what a batch of that size would take."""

    def __init__(self, seconds, clock, short_at=99):
        super().__init__(0.0)
        self.times, self.clock, self.short_at, self.batches = seconds, clock, short_at, []

    def step(self, batch):
        if len(batch.rows) >= self.short_at:
            raise MemoryError
        self.batches.append(len(batch.rows))
        self.clock[0] += self.times[len(batch.rows)]
        batch.done += 1


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(warm_stages.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "most", "limit"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4, 4),
        ({1: 1.0, 2: 1.81, 4: 3.5}, 4, 2),
        ({1: 1.0, 2: 1.83, 4: 1.0}, 4, 1),
        ({1: 1.0, 2: 1.2, 4: 2.2}, 4, 2),
        ({1: 1.0, 2: 1.2, 3: 1.3}, 3, 3),
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 1, 1),
    ],
    ids=str,
)
def test_a_batch_is_used_where_it_makes_a_tenth_more(clock, seconds, most, limit):
    found = warm(Timed(seconds, clock), BUCKETS[:1], most, {})
    assert found["batch_limits"] == {"8x32x64": limit}
    assert found["stage_seconds"]["8x32x64"]["step"] == 1.0


def test_a_batch_that_does_not_fit_is_not_used(clock):
    found = warm(Timed({1: 1.0, 2: 1.0}, clock, short_at=4), BUCKETS[:1], 8, {})
    assert found["batch_limits"] == {"8x32x64": 2}


def test_what_is_warmed_is_sampled_as_jobs_are(clock):
    renderer, begun = Timed({1: 1.0, 2: 1.0}, clock), []
    begin = renderer.begin
    renderer.begin = lambda jobs: begun.extend(jobs) or begin(jobs)
    warm(renderer, BUCKETS, 2, {}, ("few-step",))
    assert len(begun) == 2 * (1 + 2)
    assert {(job.fast, job.guidance) for job in begun} == {(("few-step",), 1.0)}


def test_what_is_known_is_not_measured_again(clock):
    renderer = Timed({1: 1.0, 2: 1.0}, clock)
    first = warm(renderer, BUCKETS, 2, {})
    renderer.batches.clear()
    assert warm(renderer, BUCKETS, 2, first) == first
    assert set(renderer.batches) == {1}


class OnGpu(slow_engine.Slow):
    """Returns whether it runs on a GPU, and notes of each batch which of its videos are guided."""

    def __init__(self, short_at=99):
        super().__init__(0.0)
        self.short_at, self.begun, self.released = short_at, [], 0

    def facts(self):
        return {**super().facts(), "device": "cuda:0"}

    def begin(self, jobs):
        made = super().begin(jobs)
        self.begun.append((jobs[0].frames, made.steps, *(job.guidance != 1.0 for job in jobs)))
        return made

    def step(self, batch):
        if len(batch.rows) >= self.short_at:
            raise MemoryError
        batch.done += 1

    def release(self):
        self.released += 1


KNOWN = {"batch_limits": {"8x32x64": 3, "16x32x64": 1}, "stage_seconds": {}}
SMALLER = [(True,), (False,), (True, True), (True, False), (False, False)]
THREE = [(True, True, True), (True, True, False), (True, False, False), (False, False, False)]


@pytest.mark.parametrize(
    ("fast", "steps", "batches"),
    [
        ((), 2, [*SMALLER, *THREE]),
        (("few-step",), 2, [*SMALLER, *THREE]),
        (("guidance-interval",), 5, [(True,), (True, True), (True, True, True)]),
        (("step-cache",), 4, [*SMALLER, *THREE]),
    ],
    ids=str,
)
def test_a_gpu_takes_every_batch_that_jobs_may_make_before_it_serves_them(fast, steps, batches):
    """Steps of each kind often enough to be recorded, also where an earlier worker has measured."""
    renderer = OnGpu()
    assert warm(renderer, BUCKETS, 4, KNOWN, fast)["batch_limits"] == KNOWN["batch_limits"]
    alone = [batch for batch in batches if len(batch) == 1]
    assert renderer.begun[2:] == [*((8, steps, *batch) for batch in batches), *((16, steps, *batch) for batch in alone)]


def test_what_does_not_fit_beside_what_was_recorded_ends_warming_up():
    renderer = OnGpu(short_at=3)
    warm(renderer, BUCKETS, 4, KNOWN)
    assert renderer.released == 1
    assert renderer.begun[-1] == (8, 2, *THREE[0])


def test_a_cpu_takes_no_batch_more_than_it_measures(clock):
    renderer = Timed({1: 1.0, 2: 1.0, 4: 1.0}, clock)
    facts = {**renderer.facts(), "device": "cpu"}
    renderer.facts = lambda: facts
    warm(renderer, BUCKETS[:1], 4, {})
    assert renderer.batches == [1, 1, 2, 2, 4, 4]


def test_pace_stretches_what_was_measured_to_other_clips():
    step_times = StepTimes()
    assert step_times.longest_silence(slow_engine.job(), 1) == 0.0
    step_times.add_measured(
        {"8x32x64": {"begin": 0.1, "step": 2.0, "finish": 5.0}, "64x32x64": {"begin": 0.1, "step": 20.0, "finish": 9.0}}
    )
    assert step_times.longest_silence(slow_engine.job(), 4) == 8.0
    assert step_times.batch_seconds(slow_engine.job(steps=10), 2) == pytest.approx(2 * 25.1)
    assert step_times.longest_silence(slow_engine.job(frames=16), 1) == 10.0
    assert step_times.longest_silence(slow_engine.job(frames=128), 1) == 40.0


def test_pace_follows_what_steps_take():
    step_times, one = StepTimes(), slow_engine.job()
    step_times.add_measured({"8x32x64": {"begin": 0.1, "step": 2.0, "finish": 0.0}})
    for _ in range(20):
        step_times.update(one, 2, 8.0)
    assert step_times.longest_silence(one, 1) == pytest.approx(4.0, rel=0.01)
