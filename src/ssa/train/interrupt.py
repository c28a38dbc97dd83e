"""SIGTERM, Ctrl-C and a terminal that goes away during training: finish the step, save, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

ECHO_SECONDS = 2.0
"""Signals so close to the first are the same request: `timeout` signals its child and then the child's group, torchrun passes on what its
workers may have got themselves."""


class StopRequest:
    """While active, the first SIGTERM, SIGINT or SIGHUP only sets `name`, for the training loop to see after its step.

    A signal ends the process at once where there is nothing to save yet (`worth_saving`), and so does a second one: the signal may have ended a
    process that the step waits for, such as the compiler's workers, and then that step never ends.

    A SIGHUP that is ignored (`nohup`) stays so.

    Signals belong to the main thread; elsewhere (a notebook's worker) it does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.worth_saving = False
        """Set by the loop, once a step is done."""
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    @property
    def number(self) -> int:
        """The signal's number; 0 = none."""
        return 0 if self.name is None else int(signal.Signals[self.name])

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is not None:
            if now - self._asked_at > ECHO_SECONDS:
                self._end(number, f"asked to stop twice ({self.name}, {signal.Signals(number).name}): ended within a step")
        elif self.worth_saving:
            self.name, self._asked_at = signal.Signals(number).name, now
        else:
            self._end(number, f"stopped by {signal.Signals(number).name} before a step was done: nothing new to save")

    def _end(self, number: int, why: str) -> None:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            os.write(2, f"\nssa: {why}\n".encode())  # print could be amid another print
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
