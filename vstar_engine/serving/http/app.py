"""The ASGI application: routes, error responses and the OpenAPI document."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from vstar_engine.serving.errors import SERVER, ApiError, invalid
from vstar_engine.serving.queue.errors import UNAVAILABLE
from vstar_engine.serving.telemetry.metrics import CONTENT_TYPE
from vstar_engine.serving.telemetry.request_log import RequestLogMiddleware
from vstar_engine.version import __version__

from . import page
from .api_keys import ApiKeys
from .field_errors import sentence
from .middleware import count_refusal, guarded
from .routes import router, service_of
from .schema import CreateVideo, Errors, Model, Models, RemixVideo
from .service import Service, unwritable

REF = "#/components/schemas/{model}"
BODIES: dict[str, type[BaseModel]] = {"create_video": CreateVideo, "create_and_wait": CreateVideo, "remix_video": RemixVideo}
CODES = {404: "not_found", 405: "method_not_allowed"}


def build(service: Service, keys: ApiKeys) -> ASGIApp:
    """Builds the application of a service. The caller starts and closes the service."""

    app = FastAPI(title="vstar-engine", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.include_router(router)
    app.include_router(page.router)
    _add_system_routes(app)
    for kind, handler in (
        (ApiError, _refuse),
        (RequestValidationError, _refuse_query),
        (HTTPException, _refuse_path),
        *((kind, _refuse_store) for kind in UNAVAILABLE),
        (Exception, _internal_error),
    ):
        app.add_exception_handler(kind, handler)
    app.openapi = lambda: _openapi(app, bool(keys))  # type: ignore[method-assign]
    return RequestLogMiddleware(guarded(app, service.settings, keys, service.metrics), service.metrics)


def _add_system_routes(app: FastAPI) -> None:
    @app.get("/livez", tags=["system"])
    async def livez() -> dict[str, str]:
        """Liveness: the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["system"], responses={503: {"description": "starting, restarting its engine, or draining"}})
    @app.get("/health", tags=["system"], responses={503: {"description": "as /readyz"}})
    async def readyz(request: Request) -> JSONResponse:
        """Readiness: the engine is warm and accepts jobs."""
        service = service_of(request)
        if service.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "draining" if service.admission.draining else "starting"}, 503)

    @app.get("/metrics", tags=["system"], response_class=Response)
    async def prometheus(request: Request) -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", tags=["models"], response_model=Models)
    async def list_models(request: Request) -> Models:
        """Lists the model of this server."""
        return Models(data=[_model(service_of(request))])

    @app.get("/v1/models/{model}", tags=["models"], response_model=Model)
    async def retrieve_model(request: Request, model: str) -> Model:
        """Describes the model: its weights, sizes and limits."""
        known = _model(service_of(request))
        if model != known.id:
            raise ApiError(404, "model_not_found", f"this server has only the model {known.id!r}", "model")
        return known


def _model(service: Service) -> Model:
    settings, spec = service.settings, service.resolver.spec
    facts = service.engine.facts() if service.runner.started.is_set() else {"size": list(spec.size), "multiple": spec.multiple}
    limits = {"max_frames": settings.max_frames, "max_steps": settings.max_steps, "max_work": settings.max_work}
    return Model(id=spec.name, created=0, facts={**facts, "limits": limits})


def _answer(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    count_refusal(service_of(request).metrics, request.scope, error)
    return _answer(error)


async def _refuse_query(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
    said, param, _ = sentence(errors, dict(request.query_params) | request.path_params)
    return await _refuse(request, invalid(said, param))


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "invalid_request")
    return await _refuse(request, ApiError(error.status_code, code, str(error.detail), headers=error.headers))


async def _refuse_store(request: Request, error: Exception) -> Response:
    return await _refuse(request, unwritable(error))


async def _internal_error(request: Request, error: Exception) -> Response:
    return await _refuse(request, ApiError(500, "internal_error", "internal error; see the server's log", None, SERVER))


def _openapi(app: FastAPI, keyed: bool) -> dict[str, Any]:
    """Returns FastAPI's document with our bodies, which are JSON or forms, and our error format."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document["components"]["schemas"]
    bodies: tuple[type[BaseModel], ...] = (CreateVideo, RemixVideo, Errors)
    for model in bodies:
        described = model.model_json_schema(ref_template=REF)
        schemas.update(described.pop("$defs", {}))
        schemas[model.__name__] = described
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe(operation, path)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if keyed:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    app.openapi_schema = document
    return document


def _describe(operation: dict[str, Any], path: str) -> None:
    operation["responses"].pop("422", None)
    if path.startswith("/v1"):
        error = {"content": {"application/json": {"schema": {"$ref": REF.format(model="Errors")}}}}
        operation["responses"]["default"] = {"description": "the error", **error}
    name = operation["operationId"].partition("_v1_")[0]
    if name in BODIES:
        content = {"schema": {"$ref": REF.format(model=BODIES[name].__name__)}}
        # a form spells lists and objects with brackets: synopsis[], tar[sigma][0]
        body = {"required": True, "content": {"application/json": content, "multipart/form-data": content}}
        operation["requestBody"] = body
    if name == "create_video":
        key = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": 200}}
        operation.setdefault("parameters", []).append(key)
