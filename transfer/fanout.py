"""The same work in several threads: the first failure stops all of them, and the gravest error is raised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from transfer.errors import Cancelled, DispatchError

T = TypeVar("T")


def in_threads(work: Callable[[], None], count: int, name: str) -> None:
    """Run `work` in `count` threads and wait for all of them; `work` itself must end once another thread has failed.

    Raises:
        BaseException: the gravest of what the threads raised.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, name=name, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise gravest(errors)


def each(values: Iterable[T], work: Callable[[T], None], count: int, name: str) -> None:
    """Call `work` with every value, in `count` threads; no value is begun after a failure.

    Raises:
        BaseException: the gravest of what `work` raised.
    """
    waiting, lock, failed = iter(values), threading.Lock(), threading.Event()

    def run() -> None:
        while not failed.is_set():
            with lock:
                value = next(waiting, waiting)
            if value is waiting:
                return
            try:
                work(value)  # type: ignore[arg-type]
            except BaseException:
                failed.set()
                raise

    in_threads(run, count, name)


def gravest(errors: Sequence[BaseException]) -> BaseException:
    """Return the gravest error: the unforeseen, then a cancellation, then what ends all attempts, then the rest."""

    def rank(error: BaseException) -> int:
        if not isinstance(error, DispatchError):
            return 0
        return 1 if isinstance(error, Cancelled) else 3 if error.retryable else 2

    return min(errors, key=rank)
