"""Attention of two versions of the source on one GPU in turns: times, and peak extra memory beside cuDNN's.

    git archive OLD src | tar -x --one-top-level=old
    python benchmarks/kernels_in_turns.py old/src src --commits OLD,NEW --try DENSE_SHARE=0.6 --out kernels-in-turns.json

Each version lives in a process of its own, and they take turns case by case. First every shape is compared with the reference in fp64, and at each
length what the new version computes with what the old one does; backward passes must repeat themselves in every bit. What fails is not timed.
`--try` adds a process of the new version with other values in `key_side`, for heads of 128 alone. Times are medians of CUDA events around replays of a graph,
with a cold L2 cache, and medians of those over the turns. The exit status is 1 where a check failed or a turn was left out.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from side_by_side import about

K = 1024
CASES = {
    "32/8/128:16x64": (8 * K, 32 * K), "32/8/128:8x128": (8 * K, 32 * K), "16/16/128:8x128": (8 * K, 32 * K),
    "32/2/64:16x16": (8 * K, 32 * K, 128 * K), "32/2/64:32x32": (8 * K, 32 * K, 128 * K), "8/8/64:16x64": (8 * K, 32 * K),
}  # fmt: skip
"""Lengths by shape. The last are heads of 64 whose attention is computed from the key side, too."""
TINY = {"2/1/16:2x16": (64,)}
"""To try the script on a CPU, without a clock."""
SAMPLE = 8192
"""Rows of a result that two versions compare."""
SECONDS = 0.06
"""For the repeats of each time."""


def worker(device: str, settings: dict[str, Any]) -> None:
    """Answers requests, one JSON a line: {"do": name of a function below, "shape", "tokens", ...}."""
    import torch

    from ssa.bench import kernels, timing
    from ssa.bench.gate import check, gate_tokens
    from ssa.bench.shapes import Shape, draw
    from ssa.ops import block_sparse_attention, select_blocks
    from ssa.testing import RMS_RATIO, rms_ratio

    on_gpu = device == "cuda"
    impl = "triton" if on_gpu else "reference"
    if settings:
        from ssa.ops.triton import key_side

        for name, value in settings.items():
            if not hasattr(key_side, name):
                raise SystemExit(f"error: --try {name}: key_side has no such setting")
            setattr(key_side, name, value)

    def ms(call: Any) -> float:
        if not on_gpu:
            call()
            return 0.0
        call()
        launched = timing.median_ms(call, 0.0)
        return launched if launched > timing.LONG_MS else timing.median_ms(timing.capture(call).replay, SECONDS)

    def memory(call: Any) -> float:
        return timing.extra_memory_gb(call) if on_gpu else 0.0

    def calls(shape: Any, tokens: int) -> dict[str, Any]:
        q, k, v = draw(shape, tokens, device, torch.bfloat16)
        size = shape.budget.block_size
        weight = torch.randn(q.shape, generator=torch.Generator(device).manual_seed(1), device=device, dtype=q.dtype)

        def attend(index: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return block_sparse_attention(q, k, v, index, block_size=size, impl=impl)

        def select() -> torch.Tensor:
            return select_blocks(q, k, shape.selection, impl=impl)[0]

        def gradients(out: torch.Tensor, keep: bool = False) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(out, (q, k, v), weight, retain_graph=keep)

        return {"attend": attend, "select": select, "gradients": gradients}

    def results(shape: Any, tokens: int) -> tuple[dict[str, torch.Tensor], bool]:
        """A sample of everything computed, and whether a second backward pass gives the same."""
        of = calls(shape, tokens)
        index = of["select"]()
        out, lse = of["attend"](index)
        first, second = of["gradients"](out, keep=True), of["gradients"](out)
        step = max(1, tokens // SAMPLE)
        named = dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *first), strict=True))
        sample = {name: x[:, ::step].cpu() for name, x in named.items()} | {"index": index[:, :, ::step].cpu()}
        return sample, all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def warm(shape: Any, lengths: list[int]) -> dict[str, Any]:
        """Compiles, and compares with fp64."""
        errors = check(shape, gate_tokens(shape) if on_gpu else min(lengths), device, impl)
        for tokens in lengths:
            results(shape, tokens)
        return {"errors": errors}

    def leave(shape: Any, tokens: int, path: str) -> dict[str, Any]:
        sample, repeats = results(shape, tokens)
        torch.save(sample, path)
        return {"repeats": repeats}

    def compare(shape: Any, tokens: int, path: str) -> dict[str, Any]:
        sample, repeats = results(shape, tokens)
        theirs = torch.load(path)
        same_choice = torch.equal(sample.pop("index"), theirs.pop("index"))
        differences = {name: rms_ratio(x.double(), theirs[name].double()) for name, x in sample.items()}
        right = repeats and same_choice and all(x <= RMS_RATIO[torch.bfloat16] for x in differences.values())
        return {"repeats": repeats, "same_choice": same_choice, "differences": differences, "right": right}

    def measure(shape: Any, tokens: int) -> dict[str, Any]:
        of = calls(shape, tokens)
        index = of["select"]()

        def forward() -> torch.Tensor:
            return of["attend"](of["select"]())[0]

        def both() -> tuple[torch.Tensor, ...]:
            return of["gradients"](forward())

        def backward() -> dict[str, float]:
            kept = of["attend"](index)[0]
            return {"backward": ms(lambda: of["gradients"](kept, keep=True))}

        found = backward() | {"both": ms(both), "both_gb": memory(both)}
        with torch.no_grad():
            return found | {"attend": ms(lambda: of["attend"](index)), "forward": ms(forward), "forward_gb": memory(forward)}

    def dense(shape: Any, tokens: int) -> dict[str, Any]:
        q, k, v = (x.detach().transpose(1, 2).contiguous().requires_grad_() for x in draw(shape, tokens, device, torch.bfloat16))
        weight = torch.randn_like(q)
        with kernels.dense_forward("cudnn", q, k, v) if on_gpu else contextlib.nullcontext(lambda: q * 1) as forward:

            def both() -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(forward(), (q, k, v), weight, allow_unused=not on_gpu)

            both()
            found = {"both_gb": memory(both)}
            if tokens <= 32 * K:
                found["both"] = ms(both)
                with torch.no_grad():
                    found["forward"] = ms(forward)
        return found

    answers = sys.stdout
    sys.stdout = sys.stderr
    steps = {f.__name__: f for f in (warm, leave, compare, measure, dense)}
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():  # capture needs a stream of its own
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = steps[request.pop("do")](Shape.parse(request.pop("shape")), **request)
            except Exception as error:  # is the answer
                answer = {"error": f"{type(error).__name__}: {timing.first_line(error)}"}
            if on_gpu:
                torch.cuda.empty_cache()
            print(json.dumps(answer), file=answers, flush=True)


class Version:
    """A process with one version of the source."""

    def __init__(self, source: Path, device: str, settings: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--worker", "--device", device, "--settings", json.dumps(settings)]
        environment = os.environ | {"PYTHONPATH": str(source.resolve())}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            return {"error": f"its process ended with {self.process.wait()}: {error}"}

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def medians(turns: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """{side: median of every figure over the turns} and, for each side but the old one, its times over those of the old one."""
    rows = {
        side: {name: statistics.median(turn[side][name] for turn in turns if side in turn) for name in turns[0][side]}
        for side in turns[0]
    }
    ratios = {
        side: {name: row[name] / rows["old"][name] for name in row if rows["old"][name]}
        for side, row in rows.items()
        if side != "old"
    }
    return {"ms": rows, "over_old": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="a directory that holds the package ssa")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--commits", default="", help="OLD,NEW: what they are, where the sources are copies without git")
    parser.add_argument("--try", dest="tries", action="append", default=[], help="NAME=VALUE of key_side; may be given again")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--budget-seconds", type=float, default=0, help="begin no turn that would end later; 0 = all turns")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: one tiny case without a clock, to try it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.device, json.loads(args.settings))
        return 0
    if args.old is None or args.new is None or args.out is None:
        parser.error("OLD, NEW and --out are needed")
    sides: dict[str, tuple[Path, dict[str, Any]]] = {"old": (args.old, {}), "new": (args.new, {})}
    for text in args.tries:
        try:
            name, value = text.split("=")
            sides[text] = args.new, {name: ast.literal_eval(value)}
        except (ValueError, SyntaxError):
            parser.error(f"--try {text!r} is not NAME=VALUE, e.g. DENSE_SHARE=0.6")
    return run(args, sides)


def run(args: argparse.Namespace, sides: dict[str, tuple[Path, dict[str, Any]]]) -> int:
    begin, cases = time.monotonic(), CASES if args.device == "cuda" else TINY
    report: dict[str, Any] = {
        "suite": "kernels-in-turns", "unit": "ms by CUDA graph, GB (1e9) of peak extra memory",
        "command": shlex.join(["python", "benchmarks/kernels_in_turns.py", *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"), "commits": args.commits.split(","),
    }  # fmt: skip
    report |= {"checks": [], "failures": [], "rows": [], "turns": 0, "skipped": []}

    def write() -> None:
        report["seconds"] = round(time.monotonic() - begin, 1)
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    def wanted(side: str, shape: str) -> bool:
        return side in ("old", "new") or "/128:" in shape or args.device == "cpu"

    def compiled(side: str, shape: str) -> dict[str, Any]:
        version = Version(sides[side][0], args.device, sides[side][1])
        answer = version.ask(do="warm", shape=shape, lengths=list(cases[shape]))
        version.end()
        return {"side": side, "shape": shape} | answer

    report |= {"old": about(args.old, args.device), "new": about(args.new, args.device)}
    write()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # compiling is what takes longest
        pairs = [(side, shape) for shape in cases for side in sides if wanted(side, shape)]
        report["checks"] = list(pool.map(lambda pair: compiled(*pair), pairs))
    wrong = {(check["side"], check["shape"]): check["error"] for check in report["checks"] if "error" in check}
    report["failures"] = [f"{side}, {shape}: {error}" for (side, shape), error in wrong.items()]
    write()
    print(f"compiled and compared with fp64: {report['seconds']} s", flush=True)

    versions = {side: Version(source, args.device, settings) for side, (source, settings) in sides.items()}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "results.pt")
        for shape, lengths in cases.items():
            for tokens in lengths:
                case = {"shape": shape, "tokens": tokens}
                here = [side for side in sides if wanted(side, shape) and (side, shape) not in wrong]
                left = versions["old"].ask(do="leave", path=path, **case)
                checks = {side: versions[side].ask(do="compare", path=path, **case) for side in here if side != "old"}
                report["checks"].append(case | {"old": left} | checks)
                bad = [f"{side}, {shape} at {tokens}: {check}" for side, check in checks.items() if not check.get("right")]
                if not left.get("repeats"):
                    bad.append(f"old, {shape} at {tokens}: {left}")
                report["failures"] += bad
                if not bad and "old" in here:
                    rows[shape, tokens] = case | {"sides": here, "cudnn": versions["old"].ask(do="dense", **case), "turns": []}
    write()
    print(f"compared with each other: {report['seconds']} s", flush=True)

    last = 0.0
    for turn in range(args.turns):
        if turn and args.budget_seconds and time.monotonic() - begin + last > args.budget_seconds:
            report["skipped"].append(f"turn {turn + 1}")
            continue
        start = time.monotonic()
        for (shape, tokens), row in rows.items():
            found = {side: versions[side].ask(do="measure", shape=shape, tokens=tokens) for side in row["sides"]}
            errors = [f"{side}, {shape} at {tokens}: {x['error']}" for side, x in found.items() if "error" in x]
            report["failures"] += errors
            if not errors:
                row["turns"].append(found)
        last, report["turns"] = time.monotonic() - start, turn + 1
        report["rows"] = [row | medians(row["turns"]) for row in rows.values() if row["turns"]]
        write()
        print(f"turn {turn + 1}: {last:.0f} s", flush=True)
    for version in versions.values():
        version.end()
    for row in report["rows"]:
        dense = row["cudnn"].get("both_gb")
        for side, figures in row["ms"].items():
            share = f", memory {figures['both_gb'] / dense:.3f} of cuDNN's" if dense else ""
            parts = ", ".join(f"{name} {figures[name]:.3f}" for name in ("attend", "backward", "forward", "both"))
            print(f"{row['shape']} T={row['tokens']} {side}: {parts} ms{share}")
    for failure in report["failures"]:
        print(f"failed: {failure}")
    write()
    return 1 if report["failures"] or report["skipped"] else 0


if __name__ == "__main__":
    sys.exit(main())
