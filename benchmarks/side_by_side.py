"""Two versions of the source on one GPU, in turns: decoding at 128k and the main rows of the kernels, by CUDA graph.

    python benchmarks/side_by_side.py OLD/src NEW/src --out side-by-side.json

Each version is measured in a process of its own with its own benchmark code, old and new by turns, `--turns` times each. The JSON has the median over
the turns of each time and new / old; the exit status is 1 where one is beyond `--largest`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROWS = {"8k": "16x16,32x32,32/8/128:16x64,32/8/128:8x128", "32k": "16x16,32x32,32/8/128:8x128", "128k": "16x16"}
"""Shapes of `ssa bench kernels` by length."""
DECODE = ("16x16", "128k", "32")
"""Shape, tokens, rows of `ssa bench decode`."""
PARTS = ("select", "attend", "forward", "both", "backward")


def worker(device: str, seconds: float) -> dict[str, float]:
    """{case: ms} of the version that this process imports."""
    import dataclasses

    import torch

    import ssa
    from ssa.bench import decode, kernels

    found: dict[str, float] = {}
    on_gpu = device == "cuda"
    rows, impl = (ROWS, "triton") if on_gpu else ({"64": "2/1/16:2x16"}, "reference")
    shape, tokens, batch = DECODE if on_gpu else ("2/1/16:2x16", "64", "2")
    if not on_gpu:  # to try the script: no clock, no graph
        for module in (kernels, decode):
            module.both_ways = lambda call, seconds=0.0: (call(), {"launches": 1.0, "graph": 1.0})[1]  # type: ignore[assignment]
            module.kernel_profile = lambda call, repeats=1: []  # type: ignore[assignment]
        kernels.extra_memory_gb = lambda call: 0.0  # type: ignore[assignment]
    print(ssa.__file__, file=sys.stderr)

    def note(case: str, times: dict[str, Any]) -> None:
        found[case] = times["launches"] if times["graph"] is None else times["graph"]

    def measure() -> None:
        for length, shapes in rows.items():
            plan = dataclasses.replace(kernels.plan(shapes, length, "cudnn", False), seconds=seconds, device=device, impl=impl)
            for row in plan.shapes:
                ours = kernels.sparse_times(row, plan.tokens[0], plan, profiled=False)["ours"]
                for part in PARTS:
                    note(f"{row}@{length}: {part}", ours[part])
        wanted = dataclasses.replace(decode.plan(shape, tokens, batch, 1, False), device=device, impl=impl)
        decode.dense_steps = lambda q, k, v: {}  # type: ignore[assignment]
        with torch.no_grad():
            row = decode.measure(wanted, wanted.shapes[0], wanted.tokens[0], wanted.batches[0])
        note(f"decode {shape}@{tokens}, {batch} rows", row["sparse"])

    if on_gpu:
        with torch.cuda.stream(torch.cuda.Stream()):  # capture needs a stream of its own
            measure()
    else:
        measure()
    return found


def about(source: Path, device: str) -> dict[str, Any]:
    """Hardware, versions and git state, as the version itself reports them."""
    code = f"import json; from ssa.bench.report import environment; print(json.dumps(environment({device + ':0' if device == 'cuda' else device!r})))"
    return json.loads(_run(source, ["-c", code]))


def _run(source: Path, arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": str(source.resolve())}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"error: {source} failed with status {done.returncode}")
    return done.stdout.splitlines()[-1]


def compared(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """{case: {"old", "new": median ms, "ratio": new / old}} of the cases that both have."""
    result = {}
    sides = {side: [turn["ms"] for turn in turns if turn["side"] == side] for side in ("old", "new")}
    for case in sides["old"][0]:
        if case in sides["new"][0]:
            old, new = (statistics.median(times[case] for times in sides[side]) for side in ("old", "new"))
            result[case] = {"old": old, "new": new, "ratio": new / old}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="a directory that holds the package ssa")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--commits", default="", help="OLD,NEW: what they are, where the sources are copies without git")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.1, help="for the repeats of each time")
    parser.add_argument("--largest", type=float, default=1.03, help="ratio that is allowed")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: one tiny case without a clock, to try the script"
    )
    parser.add_argument("--budget-seconds", type=float, default=0, help="begin no turn that would end later; 0 = all turns")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.device, args.seconds)))
        return 0
    if args.old is None or args.new is None or args.out is None:
        parser.error("OLD, NEW and --out are needed")
    sources = {"old": args.old, "new": args.new}
    begin, last = time.monotonic(), 0.0
    report: dict[str, Any] = {
        "suite": "side-by-side", "unit": "ms by CUDA graph, median of a turn's repeats", "command": shlex.join(["python", *sys.argv]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "largest": args.largest, "commits": args.commits.split(","),
        **{side: about(source, args.device) for side, source in sources.items()}, "turns": [], "skipped": 0,
    }  # fmt: skip
    for i in range(args.turns):
        for side, source in sources.items():
            if i and args.budget_seconds and time.monotonic() - begin + last > args.budget_seconds:
                report["skipped"] += 1
                continue
            start = time.monotonic()
            ms = json.loads(_run(source, [__file__, "--worker", "--device", args.device, "--seconds", str(args.seconds)]))
            last = time.monotonic() - start
            report["turns"].append({"side": side, "turn": i, "seconds": round(last, 1), "ms": ms})
            if len(report["turns"]) > 1:
                report["compared"] = compared(report["turns"])
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(f"turn {i + 1}, {side}: {last:.0f} s", flush=True)
    worst = 0.0
    for case, row in report["compared"].items():
        worst = max(worst, row["ratio"])
        print(f"{case}: {row['old']:.4f} -> {row['new']:.4f} ms, {row['ratio']:.3f}")
    return 1 if worst > args.largest or report["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
