import os
import signal
import subprocess
import sys

import pytest

from ssa.train import interrupt
from ssa.train.interrupt import StopRequest


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def test_the_first_signal_after_a_step_is_only_noted():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.number == 0
        stop.worth_saving = True
        send()
        assert (stop.name, stop.number) == ("SIGTERM", signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGINT):  # echoes, as from `timeout` or torchrun
            send(number)
        assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("late", [True, False], ids=["a second time", "before a step"])
def test_ctrl_c_interrupts_where_waiting_is_pointless(monkeypatch, capfd, late):
    monkeypatch.setattr(interrupt, "ECHO_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        stop.worth_saving = late
        if late:
            send()
        send(signal.SIGINT)
    said = capfd.readouterr().err.strip()
    assert "\n" not in said and ("asked to stop twice (SIGTERM, SIGINT)" if late else "before a step was done") in said


HANGING = """
import os, signal, sys, threading, time
from ssa.train import interrupt
interrupt.ECHO_SECONDS = 0.0
late = sys.argv[1] == "late"
with interrupt.StopRequest() as stop:
    stop.worth_saving = late
    def send():
        os.kill(os.getpid(), signal.SIGTERM)
        while late and not stop.number:  # two at once would be one
            time.sleep(0.01)
        if late:
            os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=send, daemon=True).start()
    threading.Event().wait()  # for a worker that the signal has ended
"""


@pytest.mark.parametrize("when", ["late", "early"])
def test_a_step_that_waits_forever_is_ended(when):
    done = subprocess.run([sys.executable, "-c", HANGING, when], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr.strip().startswith("ssa: ") and "\n" not in done.stderr.strip()
