"""Three ways to the same figures: `ssa eval` on local files, this project's model inside lm-evaluation-harness, and lm-eval's own `hf`.

    python benchmarks/harness_agreement.py MODEL.gguf DATA_DIR --limit 100 --out results.json

MODEL is a .gguf file or a Llama directory; it is converted for the first two ways and loaded by transformers for the third. All read
the same items; lm-eval's side uses lm-eval's own task definitions over them (`ssa.eval.harness_tasks`). Needs the extras eval and,
for a .gguf file, gguf; no network. What DATA_DIR has to hold is in docs/evaluate.md; for `--tasks wikitext` it is one file, the raw test set
wiki.test.raw (in DATA_DIR, DATA_DIR/wikitext2 or DATA_DIR/wikitext-2-raw): detokenised pages will not do, lm-eval detokenises itself.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# transformers imports a package "kernels" if there is one; this directory's scripts are none.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console

import ssa
from ssa.device import resolve_device
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.eval.harness import SSALM
from ssa.eval.harness_tasks import write_tasks
from ssa.infer.load import load_model
from ssa.model.convert import convert

TASKS = "piqa,hellaswag,arc_easy,arc_challenge,wikitext"


class LMEval:
    """lm-eval over local task definitions; keeps each item's log-likelihoods."""

    def __init__(self, tasks: Path, num_fewshot: int, seed: int) -> None:
        self.manager = TaskManager(include_path=str(tasks), include_defaults=False)
        self.num_fewshot, self.seed = num_fewshot, seed

    def __call__(self, model: Any, name: str, limit: int | None) -> tuple[dict[str, float], list[float]]:
        outcome = lm_eval.simple_evaluate(
            model, tasks=[f"local_{name}"], num_fewshot=self.num_fewshot, limit=limit, bootstrap_iters=0, log_samples=True,
            task_manager=self.manager, fewshot_random_seed=self.seed,
        )  # fmt: skip
        figures = {k.removesuffix(",none"): v for k, v in outcome["results"][f"local_{name}"].items() if k.endswith(",none")}
        samples = sorted(outcome["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        # a choice's response is [(log-likelihood, is greedy)], a page's is [log-likelihood]
        values = [r[0] if isinstance(r, (list, tuple)) else r for s in samples for group in s["resps"] for r in group]
        return {k: float(v) for k, v in figures.items() if isinstance(v, float) and "stderr" not in k}, [float(v) for v in values]


def ours(
    model: Path, data_dir: Path, name: str, limit: int | None, arguments: argparse.Namespace, out: Path
) -> tuple[dict[str, float], list[float]]:
    entry = evaluate(
        model, perplexity=False, tasks=[name], data_dir=data_dir, limit=limit, budgets="full", num_fewshot=arguments.shots,
        seeds=[arguments.seed], max_length=arguments.max_length if name == "wikitext" else None, device=arguments.device, dtype=arguments.dtype, out=out, console=Console(),
    )["tasks"][name]  # fmt: skip
    (log,) = (out / "items").glob(f"{name}-full-*")
    records = sorted((json.loads(line) for line in (log / "rank-0000.jsonl").read_text().splitlines()), key=lambda r: r["index"])
    # lm-eval's answer for a page is the sum over its windows
    values = [x for r in records for x in ([sum(r["log_likelihoods"])] if name == "wikitext" else r["log_likelihoods"])]
    return {metric: value["mean"] for metric, value in entry["budgets"]["full"]["metrics"].items()}, values


def differences(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    assert len(a) == len(b), (len(a), len(b))
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"largest": max(gaps), "mean": statistics.fmean(gaps), "mean_magnitude": statistics.fmean(map(abs, b))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int, help="items of each multiple-choice task")
    parser.add_argument("--wikitext-limit", type=int, help="pages")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-length", type=int, default=2048, help="of wikitext's windows, for all three")
    parser.add_argument("--hf-batch-size", type=int, default=16)
    arguments = parser.parse_args()

    device = resolve_device(arguments.device)
    torch.set_float32_matmul_precision("highest")
    scratch = Path(tempfile.mkdtemp(prefix="harness-agreement-"))
    try:
        names = arguments.tasks.split(",")
        write_tasks(names, arguments.data_dir, scratch / "tasks")  # first: a file that is missing is better known at once
        report = convert(arguments.model, scratch / "model")
        model, tokenizer = load_model(report.out, arguments.device, arguments.dtype)
        source = arguments.model
        kwargs = {"gguf_file": source.name} if source.is_file() else {}
        directory = source.parent if source.is_file() else source
        original = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, arguments.dtype), **kwargs)
        original_tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **kwargs)
        harness = LMEval(scratch / "tasks", arguments.shots, arguments.seed)
        value: dict[str, Any] = {
            "what": "ssa eval, the ssa model inside lm-eval, and lm-eval's hf model, on the same items, full attention",
            "command": f"python benchmarks/harness_agreement.py {source.name} DATA_DIR --tasks {arguments.tasks} --limit {arguments.limit} "
            f"--wikitext-limit {arguments.wikitext_limit} --max-length {arguments.max_length} --shots {arguments.shots} --dtype {arguments.dtype}",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": arguments.dtype, "parameters": report.parameters, "num_fewshot": arguments.shots, "seed": arguments.seed,
            "versions": {
                "ssa": ssa.__version__, "lm_eval": lm_eval.__version__, "torch": torch.__version__,
                "transformers": transformers.__version__, "python": platform.python_version(),
            },
            "tasks": {},
        }  # fmt: skip
        for name in names:
            limit = arguments.wikitext_limit if name == "wikitext" else arguments.limit
            length = arguments.max_length if name == "wikitext" else None
            hf = HFLM(
                original.to(device).eval(), tokenizer=original_tokenizer, batch_size=arguments.hf_batch_size, max_length=length,
                device=str(device),
            )  # fmt: skip
            ways: dict[str, Callable[[], tuple[dict[str, float], list[float]]]] = {
                "ssa eval": lambda n=name, k=limit: ours(scratch / "model", arguments.data_dir, n, k, arguments, scratch / "out"),
                "lm-eval, ssa": lambda n=name, k=limit, t=length: harness(
                    SSALM(model, "full", tokenizer=tokenizer, max_length=t), n, k
                ),
                "lm-eval, hf": lambda n=name, k=limit, h=hf: harness(h, n, k),
            }
            rows: dict[str, Any] = {}
            answers: dict[str, list[float]] = {}
            for way, run in ways.items():
                started = time.perf_counter()
                figures, answers[way] = run()
                rows[way] = {"metrics": figures, "seconds": round(time.perf_counter() - started, 1)}
                print(name, way, rows[way], flush=True)
            gaps = {way: differences(answers[way], answers["lm-eval, hf"]) for way in ("ssa eval", "lm-eval, ssa")}
            value["tasks"][name] = {
                "limit": limit, "log_likelihoods": len(answers["lm-eval, hf"]), "ways": rows, "difference_to_hf": gaps,
            }  # fmt: skip
            print(name, gaps, flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(value, indent=2) + "\n")  # after each task: a CPU takes long
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"harness_agreement: error: {error}")
