"""The API against a running server: cancellation, clients that leave, repeated requests, owners, events."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

import support.serve_packages  # noqa: F401 - skips where they are missing
from support.servers import SMALL, Server, error_of
from support.slow_engine import PARTS

ALICE, BOB, SCRAPER = "alice-key-0123456789", "bob-key-0123456789abc", "scraper-key-0123456789"
# a step of the slow engine in the jobs that are cancelled, and what else a cancellation may take
STEP, GRACE = 0.2, 0.5
SLOW = {"num_inference_steps": 50}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server
        server.ledger([video["id"] for video in server.every()])


def test_pages_of_others_are_kept_out(server):
    error_of(server.http.post("/v1/videos", json={"prompt": "a"}, headers={"origin": "http://evil.example"}), 403)
    error_of(server.http.get("/v1/videos", headers={"host": "evil.example"}), 403)
    assert server.http.get("/v1/videos", headers={"origin": server.url}).status_code == 200


def test_odd_words_come_back(server):
    words = "שלום \u202e עולם 🌸 ' \" <script> %s {0} \\n"
    video = server.wait(server.create(words))
    assert (video["status"], video["prompt"], video["synopsis"]) == ("completed", words, [words])


def test_a_form_may_spell_everything(server):
    fields = {
        "prompt": "a bud opens",
        "size": "64x32",
        "num_frames": "8",
        "num_inference_steps": "3",
        "tar[sigma][0]": "1.5",
        "tar[until]": "50%",
        "metadata[a]": "b",
        "enhance_prompt": "true",
    }
    answer = server.http.post("/v1/videos", data=fields)
    assert answer.status_code == 200, answer.text
    video = answer.json()
    assert video["tar"] == {"sigma": {"0": 1.5, "1": 8.0}, "strength": 1.0, "until_step": 1}
    assert (video["num_frames"], video["metadata"]) == (8, {"a": "b"})


def test_prompts_become_synopses(server):
    body = {"num_frames": 8, "size": "64x32", "num_inference_steps": 3}
    made = server.http.post("/v1/videos", json={"prompt": "a landscape from winter to spring", **body}).json()
    assert (made["synopsis_source"], len(made["synopsis"])) == ("offline", 5)
    plain = server.http.post("/v1/videos", json={"prompt": made["prompt"], **body, "enhance_prompt": False}).json()
    assert plain["synopsis"] == [plain["prompt"]]
    assert plain["seed"] != made["seed"]
    error_of(server.http.post("/v1/videos", json={"prompt": "a", "synopsis": ["a"], "enhance_prompt": True}), 400)


def test_a_video_holds_every_setting(server):
    """So that it can be asked for again from what is shown alone."""
    states = [{"text": "a seed", "at": 0, "negative": "snow"}, {"text": "a bud", "at": 0.5}, {"text": "a bloom", "at": 7}]
    asked = {
        "synopsis": states,
        "spread": "ease",
        "eta": 0.25,
        "spacing": "trailing",
        "guidance_scale": 3.5,
        "negative_prompt": "rain",
        "fps": 4,
    }
    first = server.http.post("/v1/videos", json={**SMALL, **asked, "prompt": "it grows", "enhance_prompt": None}).json()
    assert (first["spread"], first["eta"], first["sampler"], first["spacing"]) == ("ease", 0.25, "ddim", "trailing")
    assert [state["at"] for state in first["states"]] == [0, 0.5, 7]
    assert [state["negative"] for state in first["states"]] == ["snow", "rain", "rain"]
    kept = ("prompt", "size", "num_frames", "fps", "seed", "spread", "num_inference_steps", "guidance_scale", "eta", "spacing")
    again = {name: first[name] for name in (*kept, "negative_prompt", "priority", "metadata")}
    second = server.http.post("/v1/videos", json={**again, "synopsis": first["states"]}).json()
    differ = {name for name in first if first[name] != second[name]}
    assert differ <= {"id", "created_at", "status", "stage", "step", "seconds_left", "progress"}
    timed = [{"text": "a seed", "duration": 2}, "a bloom"]
    shown = server.http.post("/v1/videos", json={"synopsis": timed, **SMALL}).json()["states"]
    assert [(state["duration"], state["at"], state["negative"]) for state in shown] == [(2, None, None), (None, None, None)]


def test_the_file_can_be_read_in_parts(server):
    video = server.wait(server.create())
    path = f"/v1/videos/{video['id']}/content"
    whole = server.http.get(path)
    assert len(whole.content) == video["bytes"]
    assert whole.headers["etag"] == f'"{video["sha256"]}"'
    assert whole.headers["x-content-type-options"] == "nosniff"
    part = server.http.get(path, headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet"])
def test_the_file_can_be_asked_for_as_caches_and_players_do(server, variant):
    video = server.wait(server.create())
    path = f"/v1/videos/{video['id']}/content?variant={variant}"
    whole, head = server.http.get(path), server.http.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", whole.headers["etag"])
    assert int(head.headers["content-length"]) == len(whole.content)
    for tag in (head.headers["etag"], f'"a", W/{head.headers["etag"]}', "*"):
        same = server.http.get(path, headers={"if-none-match": tag})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", head.headers["etag"])
    assert server.http.get(path, headers={"if-none-match": '"a"'}).status_code == 200
    beyond = server.http.get(path, headers={"range": f"bytes={len(whole.content)}-"})
    error_of(beyond, 416, "invalid_range", "Range")
    assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"
    for odd in ("bytes=7-4", "frames=1-2", "bytes"):
        error_of(server.http.get(path, headers={"range": odd}), 400, "invalid_range", "Range")


def test_a_file_that_is_not_ready_is_refused_for_good(server):
    id = server.create("step=0.05", **SLOW)
    answer = server.http.get(f"/v1/videos/{id}/content")
    error_of(answer, 409, "video_not_ready")
    assert answer.headers["x-should-retry"] == "false"
    server.http.delete(f"/v1/videos/{id}")


def test_cancel_while_running(server):
    id = server.create(f"step={STEP}", **SLOW)
    server.wait(id, "in_progress")
    after = server.create()
    begun = time.monotonic()
    cancelled = server.http.post(f"/v1/videos/{id}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    server.wait(after, "in_progress", "completed")
    assert time.monotonic() - begun < STEP + GRACE
    assert server.wait(after)["status"] == "completed"
    assert server.get(id)["error"]["code"] == "cancelled"
    error_of(server.http.get(f"/v1/videos/{id}/content"), 409, "cancelled")
    assert server.http.post(f"/v1/videos/{after}/cancel").json()["status"] == "completed"


def test_cancel_while_decoding(server):
    id = server.create("finish=8")
    while server.get(id)["stage"] != "decode":
        time.sleep(0.02)
    after = server.create(num_frames=16)
    begun = time.monotonic()
    assert server.http.post(f"/v1/videos/{id}/cancel").json()["error"]["code"] == "cancelled"
    server.wait(after, "in_progress", "completed")
    assert time.monotonic() - begun < 8 / PARTS + GRACE


def test_cancel_while_waiting(server):
    first = server.create(f"step={STEP}", **SLOW)
    server.wait(first, "in_progress")
    # of another shape, and too long to go between
    second = server.create("a second", num_inference_steps=199, num_frames=16)
    assert server.http.post(f"/v1/videos/{second}/cancel").json()["error"]["code"] == "cancelled"
    server.http.post(f"/v1/videos/{first}/cancel")
    time.sleep(STEP + GRACE)
    video = server.get(second)
    assert (video["status"], video["step"]) == ("failed", None)


def test_delete_removes_everything(server):
    done, running = server.wait(server.create())["id"], server.create(f"step={STEP}", **SLOW)
    server.wait(running, "in_progress")
    for id in (done, running):
        assert server.http.delete(f"/v1/videos/{id}").json() == {"id": id, "object": "video.deleted", "deleted": True}
        error_of(server.http.get(f"/v1/videos/{id}"), 404, "video_not_found")
        assert not list((server.folder / "data" / "videos").glob(f"*{id}*"))


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_goes_on_behind_a_video_that_was_deleted(server, order):
    """A client that deletes what it lists, and a sweep meanwhile, take away what the next page is asked for by."""
    made = {server.create(f"page {number}") for number in range(3)}
    seen, after = [], {}
    while True:
        page = server.http.get("/v1/videos", params={"limit": 1, "order": order, **after}).json()
        seen += [video["id"] for video in page["data"]]
        if page["last_id"] in made:
            assert server.http.delete(f"/v1/videos/{page['last_id']}").status_code == 200
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert made <= set(seen)
    assert len(seen) == len(set(seen))
    assert made.isdisjoint(video["id"] for video in server.every())


def test_a_client_that_leaves(server):
    """One that asked for a job leaves it running; one that waits for its video takes it along."""
    id = server.create("step=0.02", **SLOW)
    leave(server, {"prompt": f"left step={STEP}", **SMALL, **SLOW})
    end = time.monotonic() + STEP + GRACE
    while any(video["prompt"].startswith("left") for video in server.every()):
        assert time.monotonic() < end
    assert server.wait(id)["status"] == "completed"


def leave(server, body, headers=None):
    """Waits a second for a video, and leaves."""
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/videos/sync", json=body, headers=headers, timeout=1.0)


@pytest.mark.parametrize(
    "headers", [{"x-stainless-retry-count": "1"}, {"idempotency-key": "left"}], ids=lambda h: next(iter(h))
)
def test_a_client_that_left_may_come_back(server, headers):
    """Its video went with it, and no second try is answered with that, not even while the first one leaves the engine."""
    body = {"prompt": "back step=0.3", **SMALL}
    leave(server, body, {name: value for name, value in headers.items() if name == "idempotency-key"})
    answer = server.http.post("/v1/videos/sync", json=body, headers=headers)
    assert (answer.status_code, answer.headers.get("content-type")) == (200, "video/mp4"), answer.text
    assert server.get(answer.headers["x-video-id"])["status"] == "completed"


def test_a_client_that_leaves_takes_no_video_of_another_request(server):
    body, key = {"prompt": "stays step=0.3", **SMALL}, {"idempotency-key": "stays"}
    id = server.http.post("/v1/videos", json=body, headers=key).json()["id"]
    leave(server, body, key)
    time.sleep(GRACE)
    assert server.wait(id)["status"] == "completed"


def test_sync_gives_the_file(server):
    answer = server.http.post("/v1/videos/sync", json={"prompt": "a tree", **SMALL})
    assert (answer.status_code, answer.headers["content-type"], answer.content[4:8]) == (200, "video/mp4", b"ftyp")
    assert float(answer.headers["x-inference-time-s"]) > 0
    assert server.get(answer.headers["x-video-id"])["status"] == "completed"
    answer = server.http.post("/v1/videos/sync", json={"prompt": "invalid", **SMALL})
    error_of(answer, 422, "invalid_request")


def test_same_key_makes_one_job(server):
    def post(_):
        with httpx.Client(base_url=server.url, timeout=30) as http:
            return http.post("/v1/videos", json={"prompt": "once", **SMALL}, headers={"idempotency-key": "the-key"})

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(post, range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    other = server.post("another body", headers={"idempotency-key": "the-key"})
    error_of(other, 409, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"


def test_a_client_that_tries_again_makes_one_job(server):
    """The reply was lost: the client says so by its count of retries, and has no key."""
    first = server.create("tried")
    again = server.post("tried", headers={"x-stainless-retry-count": "1"})
    assert again.json()["id"] == first
    assert server.create("tried") != first


def test_events_tell_the_whole_story(server):
    id = server.create("step=0.1", num_inference_steps=12)
    received, kind = [], None
    with server.http.stream("GET", f"/v1/videos/{id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("event:"):
                kind = line.partition(":")[2].strip()
            elif line.startswith("data:"):
                received.append((kind, json.loads(line.partition(":")[2])))
    kinds = [kind for kind, _ in received]
    assert (kinds[0], kinds[-1]) == ("status", "completed")
    assert [content["stage"] for kind, content in received if kind == "stage"].count("denoise") == 1
    steps = [content["step"] for kind, content in received if kind == "step"]
    assert steps == sorted(set(steps))
    assert len(steps) >= 8
    assert any(content.get("preview", "").startswith("data:image/") for kind, content in received if kind == "step")
    assert received[-1][1]["sha256"] == server.get(id)["sha256"]


def test_a_listener_hears_of_a_cancellation(server):
    id = server.create(f"step={STEP}", **SLOW)
    threading.Timer(0.5, lambda: httpx.post(f"{server.url}/v1/videos/{id}/cancel")).start()
    with server.http.stream("GET", f"/v1/videos/{id}/events") as answer:
        last = [line for line in answer.iter_lines() if line.startswith("event:")][-1]
    assert last == "event: failed"


def test_probes_and_models(server):
    assert server.http.get("/livez").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == server.http.get("/health").json() == {"status": "ready"}
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["id"] == "mini"
    assert model["facts"]["limits"]["max_frames"] == 10000
    assert "vstar_jobs_accepted_total" in server.http.get("/metrics").text
    document = server.http.get("/openapi.json").json()
    content = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert not any("422" in operation["responses"] for path in document["paths"].values() for operation in path.values())


def test_no_prompt_in_the_log(server):
    server.wait(server.create("a very secret prompt"))
    server.post("a very secret prompt", seed=-1)
    assert "very secret" not in server.log()


def test_a_blank_prompt_is_refused_by_a_sentence(server):
    answer = server.http.post("/v1/videos", json={"prompt": "  "})
    assert error_of(answer, 400, param="prompt")["message"] == "prompt: this text is blank; describe what the video shows"
    assert server.http.post("/v1/videos", json={"prompt": "a tree", **SMALL, "n": 1}).status_code == 200
    assert server.http.post("/v1/videos", data={"prompt": "a tree", "size": "64x32", "n": "1"}).status_code == 200


def test_a_worker_inherits_no_secrets(tmp_path, monkeypatch):
    """It reads files of others and runs their code."""
    monkeypatch.setenv("VSTAR_DATABASE", f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    monkeypatch.setenv("THE_KEY", "sk-secret")
    llm = ("--llm-url", "http://127.0.0.1:9/v1", "--llm-model", "m", "--llm-key-env", "THE_KEY")
    with Server(tmp_path / "server", *llm, keys=(f"alice {ALICE}",)) as server:
        (worker,) = psutil.Process(server.process.pid).children()
        inherited = worker.environ()
    assert "PYTHONPATH" in inherited
    assert not {"VSTAR_API_KEYS", "VSTAR_DATABASE", "THE_KEY"} & inherited.keys()


def test_owners_see_only_their_own(tmp_path):
    with Server(tmp_path, keys=(f"alice {ALICE}", f"bob {BOB}", f"metrics {SCRAPER}")) as server:
        alice, bob, scraper = ({"authorization": f"Bearer {key}"} for key in (ALICE, BOB, SCRAPER))
        assert "vstar_jobs_accepted_total" in server.http.get("/metrics", headers=scraper).text
        error_of(server.http.get("/v1/videos", headers=scraper), 403, "forbidden_path")
        error_of(server.post(headers=scraper), 403, "forbidden_path")
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": ALICE}, {"authorization": f"Basic {ALICE}"}):
            error_of(server.http.get("/v1/videos", headers=headers), 401, "invalid_api_key")
        for path in ("/metrics", "/openapi.json", "/v1/models", "/nonsense"):
            error_of(server.http.get(path), 401)
        assert server.http.get("/livez").status_code == 200
        id = server.post(headers=alice).json()["id"]
        path = f"/v1/videos/{id}"
        for method, there in (
            ("GET", path),
            ("DELETE", path),
            ("POST", f"{path}/cancel"),
            ("GET", f"{path}/content"),
            ("GET", f"{path}/events"),
            ("GET", f"/v1/videos?after={id}"),
        ):
            error_of(server.http.request(method, there, headers=bob), 404, "video_not_found")
        error_of(server.http.post(f"{path}/remix", json={"prompt": "mine"}, headers=bob), 404)
        assert server.http.get("/v1/videos", headers=bob).json()["data"] == []
        assert [video["id"] for video in server.http.get("/v1/videos", headers=alice).json()["data"]] == [id]
        # the same key of idempotency is another one for another owner
        same = [server.post(headers={**who, "idempotency-key": "k"}).json()["id"] for who in (alice, bob)]
        assert len(set(same)) == 2
        server.ledger([id, *same])
        assert ALICE not in server.log()
        assert BOB not in server.log()
