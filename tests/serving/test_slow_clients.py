"""F12: clients that read a kilobyte a second, and such that never end their request: the others do not feel them."""

import socket
import threading
import time

import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import Server
from vstar_engine.serving.settings import Settings

# what /livez may take, other work sharing the machine, and with --timed
P99, QUIET_P99 = 2.0, 0.1
PAUSE = 1.0


class Slow:
    """Clients that hold a connection each: they send `first`, then read a kilobyte and send `more` once a second."""

    def __init__(self, port, count, first, more=b""):
        self.port, self.first, self.more = port, first, more
        self.open, self.lasted, self.over = [], [], threading.Event()
        self.threads = [threading.Thread(target=self.run) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self):
        with socket.socket() as held:
            # so little that the server has to wait for the client, not the system
            held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            held.settimeout(PAUSE)
            held.connect(("127.0.0.1", self.port))
            held.sendall(self.first)
            begun = time.monotonic()
            while not self.over.wait(PAUSE):
                try:
                    held.sendall(self.more)
                    if not held.recv(1024):
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            else:
                return
            self.lasted.append(time.monotonic() - begun)

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join()


def asked(server, seconds):
    """Asks /livez for a while, as a probe does; returns how long each answer took."""
    took, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        assert server.http.get("/livez").status_code == 200
        took.append(time.monotonic() - begun)
        time.sleep(0.02)
    return sorted(took)


@pytest.mark.parametrize(
    ("count", "seconds"), [(10, 3), pytest.param(50, Settings.idle_timeout + 10, marks=pytest.mark.reliability)]
)
def test_slow_clients_are_not_felt(tmp_path, pytestconfig, count, seconds):
    with Server(tmp_path) as server:
        large = server.wait(server.create(size="1024x512", num_frames=64, num_inference_steps=1))
        path, host = f"/v1/videos/{large['id']}/content?variant=spritesheet", f"Host: 127.0.0.1:{server.port}\r\n"
        get = f"GET {path} HTTP/1.1\r\n{host}\r\n".encode()
        readers = Slow(server.port, count, get)
        unheard = Slow(server.port, count, f"GET /livez HTTP/1.1\r\n{host}X-Slow: ".encode(), b"a")
        try:
            took = asked(server, seconds)
        finally:
            readers.stop()
            unheard.stop()
        p99 = took[int(0.99 * len(took))]
        print(f"/livez p99 {p99 * 1e3:.1f} ms beside {count} slow readers and {count} requests without an end")
        assert p99 < (QUIET_P99 if pytestconfig.getoption("timed") else P99)
        if seconds > Settings.idle_timeout:
            assert len(unheard.lasted) == count
            assert max(unheard.lasted) < Settings.idle_timeout + 5
        server.ledger([large["id"]])
