"""What the API answers when it does not do what was asked, in the shape that OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

INVALID, UNAUTHENTICATED, LIMITED, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
# clients try 408, 409, 429 and 5xx again; this stops them where a second try cannot help
FINAL = {"x-should-retry": "false"}


class ApiError(Exception):
    """An answer of `status` whose body is `{"error": {message, type, code, param}}`."""

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
    """Returns whether a field's value cannot be served."""
    return ApiError(400, code, message, param)


def not_found(id: str) -> ApiError:
    """Returns whether a video does not exist; also said of another key's video."""
    return ApiError(404, "video_not_found", f"there is no video {id[:100]!r}", "video_id")
