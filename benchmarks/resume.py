"""Runs on several ranks that are killed or stopped half-way and resumed, beside one that was left alone: same losses, same weights?

ssa prepare builtin:python --train-bpe 4096 --out data/python
python benchmarks/resume.py data/python --recipe 60m --ranks 2 --out resume.json --data.context 1024 --train.batch-size 4 --train.accumulation 1

A killed run loses what followed its last checkpoint; all its processes get SIGKILL. A stopped one gets SIGTERM by its launcher, and saves.
On GPUs a run does not repeat itself bit by bit; how far it gets from itself is what the control tells, a second run that is left alone.
What this does not know is for the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ssa.config import load_recipe
from ssa.errors import UserError
from ssa.files import write_atomically
from ssa.train.environment import git_state, versions

ENDINGS = ("whole", "control", "killed", "stopped")


def losses(run: Path) -> dict[int, float]:
    """The loss of each step that `run` has logged so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be being written
    return {entry["step"]: entry["loss"] for entry in entries if entry["kind"] == "train"}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint."""
    last = max((run / "checkpoints").glob("step-*"))
    return {name: x for file in sorted(last.glob("model*.safetensors")) for name, x in load_file(file).items()}


def apart(whole: Path, other: Path) -> dict[str, Any]:
    """How far the run `other` is from `whole`."""
    first, second = losses(whole), losses(other)
    assert first.keys() == second.keys(), f"{other.name} has logged {len(second)} steps of {len(first)}"
    ours, theirs = weights(whole), weights(other)
    assert ours.keys() == theirs.keys()
    return {
        "largest_loss_difference": max(abs(first[step] - second[step]) for step in first),
        "first_step_apart": next((step for step in first if first[step] != second[step]), None),
        "weights_equal": all(torch.equal(ours[name], theirs[name]) for name in ours),
        "largest_weight_difference": max(float((ours[name] - theirs[name]).abs().max()) for name in ours),
    }


def descendants(process: int) -> list[int]:
    """All processes that `process` started, and theirs."""
    children = [int(p) for task in Path(f"/proc/{process}/task").glob("*/children") for p in task.read_text().split()]
    return [p for child in children for p in (child, *descendants(child))]


def start(args: argparse.Namespace, parallel: str, run: Path, *more: str) -> subprocess.Popen[bytes]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", args.ranks, "--master-port", port, "-m", "ssa", "train", args.recipe,
        "--out", run, "--data.path", args.data, "--train.steps", args.steps, "--train.log-every", 1, "--train.eval-every", args.steps,
        "--train.save-every", args.save_every, "--train.parallel", parallel, *args.overrides, *more,
    ]  # fmt: skip
    log = open(run.with_suffix(".log"), "ab")  # noqa: SIM115 the process writes to it
    return subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)


def interrupt(process: subprocess.Popen[bytes], run: Path, ending: str, after: int) -> int:
    """End `run` once it has logged `after` steps; the number it had then."""
    while process.poll() is None:
        done = max(losses(run), default=0)
        if done >= after:
            if ending == "stopped":
                process.send_signal(signal.SIGTERM)
            else:
                for each in [process.pid, *descendants(process.pid)]:
                    os.kill(each, signal.SIGKILL)
            process.wait()
            return done
        time.sleep(0.02)
    raise RuntimeError(f"{run} ended before it was interrupted, see {run.with_suffix('.log')}")


def compare(args: argparse.Namespace, parallel: str) -> dict[str, Any]:
    runs = {ending: args.runs / f"{parallel}-{ending}" for ending in ENDINGS}
    running = {ending: start(args, parallel, run) for ending, run in runs.items()}
    found: dict[str, Any] = {ending: {} for ending in ENDINGS[1:]}
    for ending in ("killed", "stopped"):
        interrupted = interrupt(running[ending], runs[ending], ending, args.steps // 2 + 2)
        found[ending] = {"interrupted_after": interrupted, "status": running[ending].returncode}
        running[ending] = start(args, parallel, runs[ending], "--resume")
    for ending, process in running.items():
        if process.wait():
            raise RuntimeError(f"{runs[ending]} failed, see {runs[ending].with_suffix('.log')}")
    for ending in ENDINGS[1:]:
        starts = json.loads((runs[ending] / "environment.json").read_text())["starts"]
        found[ending] |= {"last_start_at": starts[-1]["step"]} | apart(runs["whole"], runs[ending])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a prepared directory")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/resume"), help="a directory for the runs, new")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=15)
    parser.add_argument("--parallel", default="ddp,fsdp")
    args, args.overrides = parser.parse_known_args()
    try:
        load_recipe(args.recipe, args.overrides)
    except UserError as error:
        parser.error(str(error))
    if args.runs.exists():
        parser.error(f"--runs {args.runs} is there already: name another, or delete it")
    args.runs.mkdir(parents=True)
    found = {parallel: compare(args, parallel) for parallel in args.parallel.split(",")}
    report = {
        "command": " ".join(["python", *sys.argv]), "ranks": args.ranks,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(), "git": git_state(), "recipe": args.recipe, "overrides": args.overrides, "steps": args.steps,
        "save_every": args.save_every, "found": found,
    }  # fmt: skip
    write_atomically(args.out, json.dumps(report, indent=1) + "\n")
    for parallel, endings in found.items():
        for ending, result in endings.items():
            resumed = f" after step {result['interrupted_after']}, resumed at {result['last_start_at']}" if ending != "control" else ""
            print(
                f"{parallel}, {ending}{resumed}: losses {result['largest_loss_difference']:.2g} apart at most, first at step "
                f"{result['first_step_apart']}, weights {result['largest_weight_difference']:.2g}"
            )


if __name__ == "__main__":
    main()
