"""Logs: one structured line per event, on standard error, with the ids of the request that it is about.

Prompts and answers are never logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Literal

import structlog

# Their lines at level info repeat ours, or come once per connection.
_QUIET_LOGGERS = (
    "uvicorn",
    "uvicorn.access",
    "uvicorn.error",
    "grpc",
    "nats",
    "asyncio",
    "httpx",
    "httpcore",
    "urllib3",
)


def configure_logging(
    service: str, *, level: str = "info", log_format: Literal["auto", "console", "json"] = "auto", stream: Any = None
) -> None:
    """Sets up structlog, and routes the standard library's loggers through it. ``service`` stands in every line."""
    output = sys.stderr if stream is None else stream
    use_console = log_format == "console" or (log_format == "auto" and output.isatty())

    def add_service(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["service"] = service
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        add_service,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if use_console else "iso", utc=not use_console),
    ]
    renderers: list[Any] = (
        # The default formatter of exceptions prints local variables, prompts among them, and takes seconds to do it.
        [structlog.dev.ConsoleRenderer(colors=output.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if use_console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    quiet_level = max(logging.WARNING, root.level) if level != "debug" else logging.INFO
    for name in _QUIET_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(quiet_level)


@contextmanager
def request_context(request_id: str, attempt: int | None = None) -> Iterator[None]:
    """Every line logged inside, by this task and those that it starts, carries the ids."""
    ids: dict[str, Any] = {"request_id": request_id}
    if attempt is not None:
        ids["attempt"] = attempt
    with structlog.contextvars.bound_contextvars(**ids):
        yield
