"""The queue: a job that waits is taken at once, and an idle server hardly looks for one."""

import threading
import time

import psutil

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import SMALL, Server
from vstar_engine.serving.queue.queue_worker import WakeEvent

NEVER = 3600.0
# what is wanted of a server with nothing to do, as a share of a core, and from a POST to the start of its job, in seconds
IDLE, START = 0.01, 0.05
WATCHED = 30.0


def waited(event, timeout, act):
    """Waits in a thread, as the queue's does, while `act` happens; returns what the wait said."""
    said = []
    thread = threading.Thread(target=lambda: said.append(event.wait(timeout)), daemon=True)
    thread.start()
    act()
    thread.join(30)
    assert not thread.is_alive()
    return said[0]


def test_a_wake_ends_the_wait_of_an_idle_queue():
    event = WakeEvent(lambda: False, NEVER)
    assert waited(event, NEVER, event.wake) is False
    assert waited(event, NEVER, event.stop) is True
    assert event.is_set()


def test_a_wake_before_the_wait_ends_it_once():
    event = WakeEvent(lambda: False, 0.0)
    event.wake()
    assert waited(event, NEVER, lambda: None) is False
    assert not event._woken.is_set()


def test_while_jobs_wait_the_queue_keeps_its_interval():
    event = WakeEvent(lambda: True, NEVER)
    assert waited(event, 0.01, lambda: None) is False
    assert waited(event, NEVER, event.stop) is True


def test_an_idle_server_takes_little_and_starts_at_once(tmp_path, pytestconfig):
    """With the mini model, as `vstar-engine serve --model mini` starts it; figures, of ten starts, with --timed."""
    timed = pytestconfig.getoption("timed")
    videos, pause = (10, 0.3) if timed else (2, 0.0)
    with Server(tmp_path, model=True) as server:
        process = psutil.Process(server.process.pid)
        time.sleep(2.0 if timed else 0.1)
        before, begun = sum(process.cpu_times()[:2]), time.monotonic()
        time.sleep(WATCHED if timed else 0.2)
        share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - begun)
        starts = []
        for seed in range(videos):
            begun = time.monotonic()
            id = server.create(**SMALL, synopsis=["a", "b"], seed=seed)
            while server.get(id)["status"] == "queued":
                time.sleep(0.002)
            starts.append(time.monotonic() - begun)
            assert server.wait(id)["status"] == "completed"
            time.sleep(pause)
    starts.sort()
    median = starts[videos // 2]
    print(f"\nidle: {share:.2%} of a core; started after {median * 1e3:.0f} ms (median), {starts[-1] * 1e3:.0f} ms at most")
    if timed:
        assert share < IDLE
        assert median < START
