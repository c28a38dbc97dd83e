"""Times, memory and kernels of a call on a CUDA device. Everything runs on the current stream, which must not be the default one:
capture needs a stream of its own, and a backward pass runs on the stream of its forward pass."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
WARM_UP = 0.025  # seconds
LONG_MS = 50.0
"""A call that takes longer is not replayed as a graph: its launches are far below a percent of it."""
FLUSH_BYTES = 256 << 20  # more than any L2 cache


def median_ms(call: Call, seconds: float) -> float:
    """Median time of a call in ms over about `seconds` (3 to 100 calls), with cold L2 before each: the way of triton's `do_bench`."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    estimate = time.perf_counter() - begin
    # the host's clock is good enough for one of a long call's three times, each of which is dear
    times = [1000 * estimate] if 1000 * estimate > LONG_MS else []
    for _ in range(int(WARM_UP / estimate)):
        call()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    repeats = max(3, min(100, int(seconds / estimate))) - len(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(times + [start.elapsed_time(end) for start, end in events])


def both_ways(call: Call, seconds: float = 0.2) -> dict[str, Any]:
    """{"launches": ms, "graph": ms or None, and a "note" where it is None}: the call as it is, and replayed from a CUDA graph."""
    launches = median_ms(call, seconds)
    if launches > LONG_MS:
        return {"launches": launches, "graph": None, "note": f"above {LONG_MS:g} ms: not replayed, launches do not count"}
    try:
        graph = capture(call)
    except RuntimeError as error:
        return {"launches": launches, "graph": None, "note": f"not captured: {first_line(error)}"}
    return {"launches": launches, "graph": median_ms(graph.replay, seconds)}


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """The call, which has run before, as a graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        call()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # it only repeats that something failed
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def extra_memory_gb(call: Call) -> float:
    """GB (1e9 bytes) allocated at the peak of a call, which has run before, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def kernel_profile(call: Call, repeats: int = 5) -> list[dict[str, Any]]:
    """Kernels of one call by time: [{"name", "count", "us"}], count and microseconds a call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"name": event.key[:120], "count": event.count / repeats, "us": round(event.self_device_time_total / repeats, 2)}
        for event in kernels
    ]


def first_line(error: BaseException) -> str:
    """What went wrong, in one short line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
