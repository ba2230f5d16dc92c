"""Drives a server with whichever `openai` client can be imported, unmodified: python openai_conformance.py URL FRAMES."""

import sys
import warnings

warnings.simplefilter("ignore", DeprecationWarning)

import openai  # noqa: E402

SIZE = "64x32"
OURS = {"num_frames": 8, "num_inference_steps": 3, "enhance_prompt": False}


def refused(call, status, code, param=None):
    error = None
    try:
        call()
    except openai.APIStatusError as raised:
        error = raised
    assert error is not None, f"not refused with {status} {code}"
    assert (error.status_code, error.code) == (status, code), (error.status_code, error.body)
    assert param is None or error.param == param, error.body


def main(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="anything", max_retries=0)
    videos = client.videos

    video = videos.create(prompt="a tree", size=SIZE, seconds="4", extra_body={**OURS, "seed": 7})
    assert (video.object, video.status, video.size, video.seconds) == ("video", "queued", SIZE, "1"), video
    assert (video.prompt, video.seed, video.num_frames) == ("a tree", 7, 8), video
    assert videos.retrieve(video.id).id == video.id
    done = videos.poll(video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None), done
    assert done.completed_at >= done.created_at

    states = [{"text": "a bud", "at": 0}, {"text": "a flower", "at": 7}]
    tar = {"sigma": {"0": 1.5, "1": 8}, "strength": 0.5, "until": "50%"}
    habits = {"user": "me", "quality": "hd", "n": 1}
    whole = {"synopsis": states, "metadata": {"a": "b"}, "guidance_scale": 1.5, "tar": tar, **habits}
    body = {"num_frames": 8, "num_inference_steps": 3, **whole}
    made = videos.create_and_poll(prompt="a bud opens", size=SIZE, extra_body=body)
    assert made.status == "completed", made
    assert made.synopsis == ["a bud", "a flower"], made
    assert made.tar == {"sigma": {"0": 1.5, "1": 8.0}, "strength": 0.5, "until_step": 1}, made
    assert (made.metadata, made.guidance_scale) == ({"a": "b"}, 1.5), made

    content = videos.download_content(made.id)
    assert content.read()[4:8] == b"ftyp"
    assert content.response.headers["content-type"] == "video/mp4"
    for variant in ("thumbnail", "spritesheet"):
        assert videos.download_content(made.id, variant=variant).read()[:3] == b"\xff\xd8\xff"

    again = videos.remix(made.id, prompt="a bud freezes")
    assert (again.remixed_from_video_id, again.prompt, again.seed) == (made.id, "a bud freezes", made.seed), again
    assert videos.poll(again.id).status == "completed"

    listed = [held.id for held in videos.list(limit=2)]
    assert listed == [again.id, made.id, video.id], listed
    oldest = videos.list(order="asc", limit=1)
    assert (oldest.data[0].id, oldest.has_more) == (video.id, True), oldest
    assert [held.id for held in videos.list(after=made.id).data] == [video.id]

    failed = videos.create_and_poll(prompt="invalid", size=SIZE, extra_body=OURS)
    assert (failed.status, failed.error.code) == ("failed", "invalid_request"), failed
    refused(lambda: videos.download_content(failed.id), 422, "invalid_request")

    gone = videos.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "video.deleted")
    refused(lambda: videos.retrieve(made.id), 404, "video_not_found", "video_id")
    refused(lambda: videos.create(prompt="x", size="65x32"), 400, "invalid_value", "size")
    refused(lambda: videos.create(prompt="x", extra_body={"nonsense": 1}), 400, "unknown_field", "nonsense")
    refused(lambda: videos.create(prompt="x", model="sora-2"), 404, "model_not_found", "model")
    refused(lambda: videos.create(prompt="x", input_reference=b"a picture"), 400, "unsupported")
    if hasattr(videos, "edit"):
        refused(lambda: videos.edit(prompt="x", video=b"a video"), 400, "unsupported")
        refused(lambda: videos.extend(prompt="x", seconds="4", video=b"a video"), 400, "unsupported")
        refused(lambda: videos.create_character(name="x", video=b"a video"), 400, "unsupported")
        refused(lambda: videos.get_character("x"), 400, "unsupported")
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").facts["backend"] == "slow"
    print(openai.__version__)


if __name__ == "__main__":
    main(sys.argv[1])
