"""The errors of the package, each with the command line's exit code for it."""


class VstarError(Exception):
    """The base of the package's errors; `exit_code` is what the command line returns, 1 if not another."""

    exit_code = 1


class CheckpointError(VstarError, ValueError):
    """A weight file is damaged, incomplete, unsafe or made for another network."""

    exit_code = 3


class DownloadError(CheckpointError):
    """Weights cannot be downloaded."""

    exit_code = 13


class OutputError(VstarError, OSError):
    """A result cannot be written where it was asked for."""

    exit_code = 4


class MemoryShortage(VstarError, RuntimeError):
    """The request needs more memory than the device has free."""

    exit_code = 5


class DeviceError(VstarError, RuntimeError):
    """The device is absent, or cannot compute in the dtype asked for."""

    exit_code = 6


class MissingLibrary(VstarError, ImportError):
    """An optional library that this request needs is not installed."""

    exit_code = 7


class EndpointError(VstarError, RuntimeError):
    """A language model cannot be reached, refuses, or gives no usable answer."""

    exit_code = 8


class ExportError(VstarError, RuntimeError):
    """A network did not come out of its export as it must be, so nothing is written."""

    exit_code = 1


class EngineError(VstarError, ValueError):
    """A built engine is damaged, stale, or made for something else than what is asked of it."""

    exit_code = 9


class ServerError(VstarError, RuntimeError):
    """A server cannot be reached, or refuses; `status` is HTTP's, 0 without an answer, `code` the server's word for it."""

    exit_code = 10

    def __init__(self, message: str, status: int = 0, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class JobFailed(VstarError, RuntimeError):
    """A job ended without a video; `code` says why."""

    exit_code = 11

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


class NotFinite(VstarError, ValueError):
    """A video came out as NaN, which no file holds."""

    exit_code = 12
