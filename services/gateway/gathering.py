"""What comes without waiting is gathered, and sent before whoever sends it waits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class BeforeWaiting(Generic[T]):
    """Awaits ``upcoming``; where that has to wait, awaits ``flush`` first. What that raises is thrown into ``upcoming``."""

    def __init__(self, upcoming: Awaitable[T], flush: Callable[[], Awaitable[None]]) -> None:
        self._upcoming = upcoming
        self._flush = flush

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._upcoming.__await__()
        try:
            awaited = next(steps)
        except StopIteration as result:
            value: T = result.value
            return value
        # ``steps`` stands in the middle of its work: whatever happens from here on, it is told.
        error: BaseException | None = None
        try:
            yield from self._flush().__await__()
        except BaseException as failure:
            error = failure
        return (yield from _go_on(steps, awaited, error))


class Begun(Generic[T]):
    """What has made its first step already, and waits for ``awaited``: awaited, it goes on."""

    def __init__(self, steps: Generator[Any, Any, T], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, T]:
        return _go_on(self._steps, self._awaited, None)


def _go_on(steps: Generator[Any, Any, T], awaited: Any, error: BaseException | None) -> Generator[Any, Any, T]:
    """Whatever is awaited, and whatever is thrown meanwhile, goes through."""
    while True:
        try:
            if error is None:
                try:
                    answer = yield awaited
                except BaseException as failure:
                    error = failure
                    continue
                awaited = steps.send(answer)
            else:
                thrown, error = error, None
                awaited = steps.throw(thrown)
        except StopIteration as result:
            value: T = result.value
            return value
