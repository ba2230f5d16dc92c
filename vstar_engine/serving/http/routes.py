"""The routes under `/v1/videos`."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from pydantic import ValidationError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from vstar_engine.serving.errors import FINAL, SERVER, ApiError, invalid
from vstar_engine.serving.jobs import result_files
from vstar_engine.serving.jobs.events import CANCELLED
from vstar_engine.serving.jobs.progress import COMPLETED, FAILED
from vstar_engine.serving.queue.stored_job import StoredJob

from .field_errors import sentence
from .request_body import read_body
from .schema import CreateVideo, Deleted, RemixVideo, VideoList, VideoObject, VideoSettings
from .service import Caller, Service
from .unknown_fields import PICTURES
from .video_object import poll_after

router = APIRouter(prefix="/v1/videos", tags=["videos"])
Body = TypeVar("Body", bound=VideoSettings)
MEDIA = {"video": "video/mp4", "thumbnail": "image/jpeg", "spritesheet": "image/jpeg"}
# for requests of OpenAI's clients that this engine does not support
UNSUPPORTED = "is not supported: this engine makes videos from text, and `remix` makes one again with another prompt"
# seconds between two reads of a job that another server runs
PAUSE = 1.0
PING = 15


def service_of(request: Request) -> Service:
    return request.app.state.service


def caller_of(request: Request) -> Caller:
    return request.state.caller


async def read(request: Request, kind: type[Body]) -> Body:
    """Reads and checks a body; ApiError names the invalid field. In forms all values are text."""
    content, form = await read_body(request)
    if picture := next((name for name in PICTURES if name in content), None):
        raise ApiError(400, "unsupported", f"a video from a picture {UNSUPPORTED}", picture)
    try:
        return kind.model_validate(content, strict=not form)
    except ValidationError as error:
        said, param, strange = sentence(error.errors(include_url=False), content)
        raise invalid(said, param, "unknown_field" if strange else "invalid_value") from error


def answer(service: Service, stored: StoredJob, status: int = 200) -> JSONResponse:
    """Returns a video, and in a header when to poll again."""
    shown = service.show(stored)
    headers = {"openai-poll-after-ms": str(poll_after(shown))}
    return JSONResponse(shown.model_dump(mode="json"), status, headers=headers)


@router.post("", response_model=VideoObject)
async def create_video(request: Request) -> JSONResponse:
    """Accepts a video. A repeated Idempotency-Key returns the video of the first request."""
    service = service_of(request)
    return answer(service, await service.create(caller_of(request), await read(request, CreateVideo)))


@router.get("", response_model=VideoList)
async def list_videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    """Lists the caller's videos, by default the newest first; `after` is the last id of the page before."""
    service, owner = service_of(request), caller_of(request).owner
    cursor = None if after is None else await service.cursor(owner, after)
    stored_jobs, more = await service.store.page(owner, cursor, limit, order == "desc")
    data = [service.show(stored) for stored in stored_jobs]
    ends = (data[0].id, data[-1].id) if data else (None, None)
    return JSONResponse(VideoList(data=data, first_id=ends[0], last_id=ends[1], has_more=more).model_dump(mode="json"))


@router.post("/sync", response_class=FileResponse)
async def create_and_wait(request: Request) -> FileResponse:
    """Makes a video and returns its mp4. If the client disconnects, the video is deleted unless it existed before."""
    service, caller = service_of(request), caller_of(request)
    stored = await service.create(caller, await read(request, CreateVideo))
    request.state.accepted = True
    ended = asyncio.ensure_future(service.ended(stored, service.settings.sync_timeout))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((ended, gone), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done() or ended.result().outcome is None:
            if stored.new:
                await (service.withdraw if gone.done() else service.cancel)(caller.owner, stored.job.id)
            said = "the video took too long for one request; POST /v1/videos does not wait"
            raise ApiError(504, "timeout", said, None, SERVER, FINAL)
    finally:
        ended.cancel()
        gone.cancel()
    return _file(service, ended.result(), "video")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@router.post("/edits", include_in_schema=False)
@router.post("/extensions", include_in_schema=False)
@router.post("/characters", include_in_schema=False)
@router.get("/characters/{character_id}", include_in_schema=False)
async def unsupported(request: Request) -> None:
    """Refuses what this engine does not support."""
    raise ApiError(400, "unsupported", f"{request.url.path} {UNSUPPORTED}")


@router.get("/{video_id}", response_model=VideoObject)
async def retrieve_video(request: Request, video_id: str) -> JSONResponse:
    """Returns a video and its progress. A failed one has `status` failed and an `error`."""
    service = service_of(request)
    return answer(service, await service.get(caller_of(request).owner, video_id))


@router.delete("/{video_id}", response_model=Deleted)
async def delete_video(request: Request, video_id: str) -> Deleted:
    """Cancels a video if it runs, and deletes it with its files."""
    await service_of(request).delete(caller_of(request).owner, video_id)
    return Deleted(id=video_id)


@router.post("/{video_id}/cancel", response_model=VideoObject)
async def cancel_video(request: Request, video_id: str) -> JSONResponse:
    """Cancels a video and keeps its record; one that has ended is not changed."""
    service = service_of(request)
    return answer(service, await service.cancel(caller_of(request).owner, video_id))


@router.post("/{video_id}/remix", response_model=VideoObject)
async def remix_video(request: Request, video_id: str) -> JSONResponse:
    """Makes a video again with another prompt; seed, size and settings stay the same unless given."""
    service = service_of(request)
    body = await read(request, RemixVideo)
    return answer(service, await service.remix(caller_of(request), video_id, body))


class RangedFile(FileResponse):
    """A file response with ranges; an invalid range gets an error in the API's format."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def checked(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                ranges = {name: value for name, value in Headers(raw=message["headers"]).items() if name == "content-range"}
                said = "Range must be bytes=FIRST-LAST within the file"
                raise ApiError(message["status"], "invalid_range", said, "Range", headers=ranges)
            await send(message)

        await super().__call__(scope, receive, checked)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={206: {"description": "the range"}, 304: {"description": "not modified: If-None-Match names this version"}},
)
async def download_content(
    request: Request, video_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> Response:
    """Returns a finished video's file."""
    service = service_of(request)
    file = _file(service, await service.get(caller_of(request).owner, video_id), variant)
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.headers["etag"] in known or "*" in known:
        return Response(status_code=304, headers={name: file.headers[name] for name in ("etag", "cache-control")})
    return file


def _file(service: Service, stored: StoredJob, variant: str) -> FileResponse:
    shown = service.show(stored)
    if shown.status == FAILED:
        assert shown.error is not None
        status = 409 if shown.error.code == CANCELLED else 422
        raise ApiError(status, shown.error.code, f"the video failed: {shown.error.message}", headers=FINAL)
    if shown.status != COMPLETED:
        raise ApiError(409, "video_not_ready", f"the video is {shown.status}", headers=FINAL)
    path = service.settings.videos / dict(zip(MEDIA, result_files.names(shown.id), strict=True))[variant]
    whole = path.is_file() and (variant != "video" or path.stat().st_size == shown.bytes)
    if not whole:
        raise ApiError(404, "content_missing", f"the {variant} is no longer on this server")
    headers = {"x-video-id": shown.id, "cache-control": "private, no-transform"}
    if variant == "video":
        headers |= {"etag": f'"{shown.sha256}"', "x-inference-time-s": f"{sum((shown.inference_seconds or {}).values()):.3f}"}
    else:
        headers["etag"] = f'"{shown.sha256}.{variant}"'
    return RangedFile(path, media_type=MEDIA[variant], filename=path.name, headers=headers)


@router.get("/{video_id}/events", response_class=EventSourceResponse)
async def follow_video(request: Request, video_id: str) -> EventSourceResponse:
    """Streams the events of a video: `status`, `stage` and `step`, and last `completed` or `failed`."""
    service = service_of(request)
    stored = await service.get(caller_of(request).owner, video_id)
    return EventSourceResponse(follow(service, stored), ping=PING)


async def follow(service: Service, stored: StoredJob) -> AsyncIterator[ServerSentEvent]:
    """Yields the current state, then each change. A slow reader misses steps, never the last event."""
    service.streams += 1
    previous: dict[str, Any] = {}
    try:
        while not service.over:
            shown, progress = service.show(stored), service.runner.tracker[stored.job.id]
            version = progress.version if progress else 0
            if shown.status in (COMPLETED, FAILED):
                yield _event(shown.status, shown.model_dump(mode="json"))
                return
            if previous.get("status") != shown.status:
                yield _event("status", shown.model_dump(mode="json"))
            if shown.stage and previous.get("stage") != shown.stage:
                yield _event("stage", {"stage": shown.stage})
            if shown.step and previous.get("step") != shown.step:
                preview = progress.preview if progress and progress.preview is not previous.get("preview") else None
                yield _event("step", _step(shown, preview))
            previous = {
                **shown.model_dump(include={"status", "stage", "step"}),
                "preview": progress.preview if progress else None,
            }
            if progress is not None:
                await progress.wait_for_change(version, PAUSE)
            else:
                await asyncio.sleep(PAUSE)
            if progress is None or progress.version == version:
                known = await service.store.get(stored.job.id)
                if known is None:
                    return
                stored = known
    finally:
        service.streams -= 1


def _step(shown: VideoObject, preview: str | None) -> dict[str, Any]:
    said = {
        "step": shown.step,
        "total": shown.num_inference_steps,
        "progress": shown.progress,
        "seconds_left": shown.seconds_left,
    }
    return said if preview is None else {**said, "preview": preview}


def _event(name: str, content: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(content), event=name)
