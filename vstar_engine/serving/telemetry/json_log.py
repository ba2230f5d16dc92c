"""Log records as JSON lines, for the server and its workers."""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

# attributes of a record that are not fields of the line
OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
PLAIN = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object: time, level, logger, message, the values of `context`, and `extra`."""

    def __init__(self, context: Mapping[str, Callable[[], str | None]] | None = None):
        super().__init__()
        self.context = dict(context or {})

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, read in self.context.items() if (value := read()) is not None}
        line |= {name: value for name, value in vars(record).items() if name not in OWN and name[0] != "_"}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: int | str, formatter: logging.Formatter, stream: TextIO | None = None) -> None:
    """Sends the logs of this process to `stream`, stderr if None."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("vstar_engine").setLevel(logging.NOTSET)  # the other commands set it higher


def formatter(as_json: bool) -> logging.Formatter:
    """Returns the formatter of a process without requests, such as a worker."""
    return JsonLines() if as_json else logging.Formatter(PLAIN)


def as_json() -> bool:
    """Returns whether this process logs JSON; its child processes then do the same."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)
