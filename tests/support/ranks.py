"""Ranks as threads, and a sum over them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from libraries import Library


def in_threads(library: Library) -> None:
    """Skip where arrays of one thread are of no use in another."""
    if library.name == "mlx":
        pytest.skip("an MLX array cannot be read outside the thread that made it")


class Simulated:
    """A sum over so many threads, in the order of their ranks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls = 0
        self._barrier = threading.Barrier(count, timeout=60)
        self._parts: dict[int, Any] = {}

    def run(self, work: Callable[[int, Callable[[Any], Any]], Any]) -> list[Any]:
        """``work(rank, all_reduce)`` on every rank."""
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(self._guarded, work, rank) for rank in range(self.count)]
            return [future.result() for future in futures]

    def _guarded(self, work: Callable[[int, Callable[[Any], Any]], Any], rank: int) -> Any:
        try:
            return work(rank, lambda x: self._sum(rank, x))
        except BaseException:
            self._barrier.abort()
            raise

    def _sum(self, rank: int, x: Any) -> Any:
        self._parts[rank] = x
        self._barrier.wait()
        total = self._parts[0]
        for other in range(1, self.count):
            total = total + self._parts[other]
        self.calls += rank == 0
        self._barrier.wait()
        return total
