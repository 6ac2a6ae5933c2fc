"""An event loop in a thread of its own, so that plain code can use what is asynchronous underneath."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for callers in any thread until :meth:`close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; an interrupted caller cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def gather(self, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """The results in order. The first error cancels the rest and is raised."""

        async def together() -> list[T]:
            tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        return self.run(together())

    def iterate(self, source: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items of ``source`` as they come. Closing the iterator closes ``source`` before it returns."""
        items: SimpleQueue[tuple[T] | None] = SimpleQueue()

        async def pump() -> None:
            try:
                async for item in source:
                    items.put((item,))
            finally:
                await source.aclose()
                items.put(None)

        pumping = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (item := items.get()) is not None:
                yield item[0]
            pumping.result()
        finally:
            if not pumping.done():
                pumping.cancel()
                while items.get() is not None:
                    pass

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
