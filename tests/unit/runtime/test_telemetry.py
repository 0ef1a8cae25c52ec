"""Log lines are structured, carry the request's ids and the service's name, and include other libraries' loggers."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from baton.services.runtime.telemetry import configure_logging, request_context


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_carry_service_level_and_fields() -> None:
    stream = io.StringIO()
    configure_logging("decode-0", stream=stream)
    structlog.get_logger("a.b").info("granted", num_blocks=3)
    (line,) = lines(stream)
    assert {key: line[key] for key in ("event", "service", "level", "logger", "num_blocks")} == {
        "event": "granted",
        "service": "decode-0",
        "level": "info",
        "logger": "a.b",
        "num_blocks": 3,
    }
    assert "timestamp" in line


def test_request_ids_are_on_every_line_inside_and_only_there() -> None:
    stream = io.StringIO()
    configure_logging("gateway", stream=stream)
    log = structlog.get_logger()
    with request_context("req-1", attempt=2):
        log.info("inside")
        logging.getLogger("library").warning("library line")
    log.info("outside")
    inside, library, outside = lines(stream)
    assert (inside["request_id"], inside["attempt"]) == ("req-1", 2)
    assert (library["request_id"], library["event"]) == ("req-1", "library line")
    assert "request_id" not in outside


def test_level_filters_and_chatty_libraries_are_quiet() -> None:
    stream = io.StringIO()
    configure_logging("gateway", level="warning", stream=stream)
    structlog.get_logger().info("hidden")
    logging.getLogger("uvicorn.access").info("GET /")
    structlog.get_logger().warning("shown")
    assert [line["event"] for line in lines(stream)] == ["shown"]


def test_exceptions_stay_on_one_line() -> None:
    stream = io.StringIO()
    configure_logging("gateway", stream=stream)
    try:
        raise ValueError("x")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = lines(stream)
    assert "ValueError: x" in str(line["exception"])


def test_console_format_is_for_people() -> None:
    stream = io.StringIO()
    configure_logging("gateway", log_format="console", stream=stream)
    structlog.get_logger().info("granted", num_blocks=3)
    assert "granted" in stream.getvalue()
    assert "num_blocks" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_a_logged_exception_on_the_console_does_not_show_local_variables() -> None:
    stream = io.StringIO()
    configure_logging("gateway", log_format="console", stream=stream)
    prompt = "-".join(["my", "private", "text"])
    try:
        raise RuntimeError(f"{len(prompt)} characters were too many")
    except RuntimeError as error:
        structlog.get_logger().error("failed", exc_info=error)
    assert "15 characters were too many" in stream.getvalue()
    assert prompt not in stream.getvalue()
