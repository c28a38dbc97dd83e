import json
import os
import signal
import subprocess
import sys
import time

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


@pytest.mark.parametrize("ignored", [False, True], ids=["a terminal goes", "nohup"])
def test_a_hangup_is_noted_unless_it_is_ignored(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            stop.worth_saving = True
            send(signal.SIGHUP)
            assert stop.name == (None if ignored else "SIGHUP")
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_outlives_its_reader_and_saves_on_a_hangup(shards, tmp_path):
    """As `ssa train | head -1` in a terminal that is closed later."""
    words = {"data.path": shards, "data.context": 32, "model.num-hidden-layers": 1, "train.batch-size": 1, "train.eval-every": 0,
             "train.save-every": 0, "train.log-every": 1, "train.steps": 10**6, "train.device": "cpu"}  # fmt: skip
    command = [sys.executable, "-m", "ssa", "train", "tiny", "--out", tmp_path / "run"]
    command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored
        )  # fmt: skip
    try:
        assert process.stdout.readline()
        process.stdout.close()
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 5):
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        assert process.wait() == 0, (tmp_path / "stderr").read_text()
    finally:
        process.kill()
    said = (tmp_path / "stderr").read_text()
    assert "ssa: warning: standard output is gone (Broken pipe): going on without it" in said and "Traceback" not in said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(lines) > 5 and checkpoint.name == f"step-{len(lines):08}"
