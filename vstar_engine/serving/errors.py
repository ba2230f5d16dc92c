"""The API's errors, in the format of OpenAI's clients."""

from collections.abc import Mapping
from typing import Any

INVALID, UNAUTHENTICATED, LIMITED, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
# clients retry 408, 409, 429 and 5xx; this header stops them if a retry cannot succeed
FINAL = {"x-should-retry": "false"}


class ApiError(Exception):
    """A response of `status` with the body `{"error": {message, type, code, param}}`."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        type: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.type = status, code, message, param, type
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "code": self.code, "param": self.param}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Returns the error 400 for a field's value."""
    return ApiError(400, code, message, param)


def not_found(id: str) -> ApiError:
    """Returns the error 404 for a video that does not exist or belongs to another key."""
    return ApiError(404, "video_not_found", f"there is no video {id[:100]!r}", "video_id")
