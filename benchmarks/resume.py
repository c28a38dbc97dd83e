"""Runs on several ranks that are killed or stopped half-way and resumed, beside one that was left alone: same losses, same weights?

ssa prepare builtin:python --train-bpe 4096 --out data/python
python benchmarks/resume.py data/python --recipe 60m --ranks 2 --out resume.json --data.context 1024 --train.batch-size 4 --train.accumulation 1

The four runs go at the same time, on the same GPUs. A killed run loses what followed its last checkpoint; all its processes get SIGKILL. A stopped one gets SIGTERM by its launcher, and saves.
On GPUs a run does not repeat itself bit for bit; how far it gets from itself is what the control tells, a second run that is left alone.
What this does not know is for the recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
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
from ssa.runs.provenance import git_state, versions

ENDINGS = ("whole", "control", "killed", "stopped")
WAYS = ("ddp", "fsdp", "hsdp")


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
    found = []
    with contextlib.suppress(OSError):  # it may have ended
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launcher and its ranks, and wait until they are gone: until then they hold the run's lock and their GPU's memory."""
    family = [process.pid, *descendants(process.pid)]
    for each in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 30
    while any(_alive(each) for each in family[1:]) and time.monotonic() < until:
        time.sleep(0.05)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(args: argparse.Namespace, parallel: str, run: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", args.ranks, "-m", "ssa", "train", args.recipe,
        *args.overrides, "--out", run, "--data.path", args.data, "--train.steps", args.steps, "--train.log-every", 1,
        "--train.eval-every", args.steps, "--train.save-every", args.save_every, "--train.parallel", parallel, *more,
    ]  # fmt: skip
    log = open(run.with_suffix(".log"), "ab")  # noqa: SIM115 the process writes to it
    return subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)


def interrupt_at(steps: int) -> int:
    return steps // 2 + 2


def compare(args: argparse.Namespace, parallel: str) -> dict[str, Any]:
    runs = {ending: args.runs / f"{parallel}-{ending}" for ending in ENDINGS}
    found: dict[str, Any] = {ending: {} for ending in ENDINGS[1:]}
    running: dict[str, subprocess.Popen[bytes]] = {}
    to_interrupt, stopping = ["killed", "stopped"], []
    try:
        for ending, run in runs.items():
            running[ending] = start(args, parallel, run)
        while any(process.poll() is None for process in running.values()):
            ended = [ending for ending, process in running.items() if process.poll() is not None]
            if any(running[ending].returncode and ending not in stopping for ending in ended):
                break
            for ending in list(to_interrupt):
                done = max(losses(runs[ending]), default=0)
                if done >= interrupt_at(args.steps):
                    to_interrupt.remove(ending)
                    found[ending]["interrupted_after"] = done
                    stopping.append(ending)
                    if ending == "killed":
                        kill(running[ending])
                    else:
                        running[ending].send_signal(signal.SIGTERM)
            for ending in list(stopping):
                if running[ending].poll() is not None:
                    stopping.remove(ending)
                    found[ending]["status"] = running[ending].returncode
                    running[ending] = start(args, parallel, runs[ending], "--resume")
            time.sleep(0.02)
        for ending, process in running.items():
            if process.returncode or ending in to_interrupt:
                why = f"ended with status {process.returncode}" if process.returncode else "ended before it was interrupted"
                raise UserError(f"{runs[ending]} {why}, see {runs[ending].with_suffix('.log')}")
    finally:
        for process in running.values():
            if process.poll() is None:
                kill(process)
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
    ways = args.parallel.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--parallel {unknown[0]!r} is not one of {', '.join(WAYS)}")
    if interrupt_at(args.steps) >= args.steps or not 0 < args.save_every <= args.steps // 2:
        parser.error(
            f"--steps {args.steps} --save-every {args.save_every}: a run needs steps after it was interrupted, and a checkpoint before"
        )
    if not (args.data / "index.json").is_file():
        parser.error(f"{args.data} is not a prepared directory: make one with ssa prepare")
    if args.runs.exists():
        parser.error(f"--runs {args.runs} is there already: name another, or delete it")
    try:
        load_recipe(args.recipe, args.overrides)
        args.runs.mkdir(parents=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left running
        found = {parallel: compare(args, parallel) for parallel in ways}
    except UserError as error:
        parser.error(str(error))
    report = {
        "command": " ".join(["python", *sys.argv]), "ranks": args.ranks,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(), "git": git_state(), "recipe": args.recipe, "overrides": args.overrides, "steps": args.steps,
        "save_every": args.save_every, "found": found,
    }  # fmt: skip
    write_atomically(args.out, json.dumps(report, indent=1) + "\n")
    for parallel, endings in found.items():
        for ending, result in endings.items():
            after = result.get("interrupted_after")
            how = ending if after is None else f"{ending} after step {after}, resumed at {result['last_start_at']}"
            if result["weights_equal"] and result["first_step_apart"] is None:
                print(f"{parallel}, {how}: the same in every bit")
                continue
            print(
                f"{parallel}, {how}: losses {result['largest_loss_difference']:.2g} apart at most, first at step "
                f"{result['first_step_apart']}, weights {result['largest_weight_difference']:.2g}"
            )


if __name__ == "__main__":
    main()
