"""Batches made ahead of time: a thread reads shards while the device computes, so that a step finds its batch waiting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch

Batch = dict[str, "torch.Tensor"]


class Prefetcher:
    """`batch(first)`, `batch(first + 1)`, ... up to `batch(last - 1)`, at most `depth` of them ahead of the one that was asked for.

    `batch` must be a pure function of the step, as `PackedLoader.batch` is: then being ahead has no state to save, and a resumed run starts
    another `Prefetcher` at its step. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, batch: Callable[[int], Batch], first: int, last: int, *, depth: int = 2, device: torch.device | None = None
    ) -> None:
        """`device`: a CUDA device for which batches are to be in pinned memory, so that copies to it run beside its work."""
        self._batch, self._next, self._last = batch, first, last
        self._pinned_for = _with_index(device) if device is not None and device.type == "cuda" else None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(max(1, depth))
        self._stopped = threading.Event()
        self._waited = 0.0
        self._thread = threading.Thread(target=self._fill, args=(first,), name="prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> Batch:
        """The batch of `step`; steps come in order. Raises here what `batch` raised in the thread."""
        if step != self._next or step >= self._last:
            raise ValueError(f"step {step} asked for, step {self._next} of those before {self._last} is next")
        if self._stopped.is_set():
            raise ValueError("the prefetcher is closed")
        start = time.perf_counter()
        found = self._queue.get()
        self._waited += time.perf_counter() - start
        if isinstance(found, BaseException):
            self._queue.put(found)  # for whoever asks again: the thread has ended
            raise found
        self._next += 1
        return found

    def take_wait(self) -> float:
        """Seconds that `get` has waited since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """End the thread; returns when it has ended."""
        self._stopped.set()
        while self._thread.is_alive():
            try:  # it may be waiting for room
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, step: int) -> None:
        try:
            if self._pinned_for is not None:
                torch.cuda.set_device(self._pinned_for)  # of this thread; pinning would otherwise open a context on the first one
            while step < self._last and not self._stopped.is_set():
                batch = self._batch(step)
                if self._pinned_for is not None:
                    batch = {name: x.pin_memory() for name, x in batch.items()}
                self._queue.put(batch)
                step += 1
        except BaseException as error:
            self._queue.put(error)


def _with_index(device: torch.device) -> torch.device:
    """The caller's current device where `device` names none: another thread has another."""
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
