"""A converted Llama against its source: logits and WikiText-2 perplexity, full and sparse at several budgets.

    python benchmarks/smollm2_conversion.py DIRECTORY_OR_GGUF test_pages_detok.jsonl --out results.json

The text is cut into windows of 2048 tokens page by page; the first token of a window is not predicted. Sparse figures are of a
model that was never trained sparse: they show the attention gap, not the method.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ssa
from ssa.budget import FULL, parse_readings
from ssa.data.lines import read_objects
from ssa.data.tokenizer import load_tokenizer
from ssa.eval.model_under_test import attention
from ssa.model import SSAForCausalLM
from ssa.model.convert import convert

WINDOW = 2048


class Text:
    """Pages cut into windows; perplexity over them."""

    def __init__(self, pages: list[dict], tokenizer: PreTrainedTokenizerFast) -> None:
        self.words = sum(page["words"] for page in pages)
        ids = [tokenizer(page["text"], add_special_tokens=False).input_ids for page in pages]
        self.windows = [torch.tensor([page[i : i + WINDOW]]) for page in ids for i in range(0, len(page), WINDOW)]
        self.tokens = sum(window.shape[1] - 1 for window in self.windows)

    def perplexity(self, token_nll: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | int]:
        nll = sum(token_nll(window).double().sum().item() for window in self.windows)
        return {
            "predicted_tokens": self.tokens,
            "words": self.words,
            "token_perplexity": round(math.exp(nll / self.tokens), 4),
            "word_perplexity": round(math.exp(nll / self.words), 4),
        }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("pages", type=Path, help="JSON lines of {text, words}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-pages", type=int, default=7)
    parser.add_argument("--sparse-pages", type=int, default=3, help="the source and the sparse budgets read so many pages only")
    parser.add_argument("--budgets", default="full,16x16,32x32,64x16")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        report = convert(arguments.source, Path(scratch) / "model")
        seconds = time.perf_counter() - started
        model = SSAForCausalLM.from_pretrained(report.out).eval()
        tokenizer = load_tokenizer(report.out)
        convert(report.out, Path(scratch) / "llama", to="llama")
        exported = AutoModelForCausalLM.from_pretrained(Path(scratch) / "llama").eval()
    file = arguments.source if arguments.source.is_file() else next(iter(arguments.source.glob("*.gguf")), None)
    kwargs = {"gguf_file": file.name, "dtype": torch.float32} if file else {}
    original = AutoModelForCausalLM.from_pretrained(file.parent if file else arguments.source, **kwargs).eval()

    pages = list(islice(read_objects(arguments.pages, dict, "{file}:{line} is no page"), arguments.num_pages))
    texts = {}
    for count in {len(pages), min(arguments.sparse_pages, len(pages))}:
        texts[count] = Text(pages[:count], tokenizer)

    first = texts[len(pages)].windows[0][:, :512]
    source_logits = original(first).logits
    differences = {
        "converted, full": (model(first, attention_mode="full").logits - source_logits).abs().max().item(),
        "exported to llama": (exported(first).logits - source_logits).abs().max().item(),
    }
    value = {
        "command": f"python benchmarks/smollm2_conversion.py {arguments.source.name} {arguments.pages.name} --num-pages {len(pages)} "
        f"--sparse-pages {arguments.sparse_pages} --budgets {arguments.budgets}",
        "what": "converted checkpoint against its source; sparse figures without sparse training",
        "window_tokens": WINDOW,
        "dtype": report.dtype,
        "parameters": report.parameters,
        "conversion_seconds": round(seconds, 1),
        "max_abs_logit_difference": differences,
        "largest_logit": source_logits.abs().max().item(),
        "results": [],
        "versions": {"ssa": ssa.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def measure(who: str, budget: str, count: int, token_nll: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Written after each, because a wide budget takes a CPU many minutes."""
        value["results"].append({"model": who, "attention": budget, "pages": count, **texts[count].perplexity(token_nll)})
        print(value["results"][-1], flush=True)
        arguments.out.write_text(json.dumps(value, indent=2) + "\n")

    def source_nll(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(original(ids).logits[0, :-1], ids[0, 1:], reduction="none")

    few = min(texts)
    measure("source", "full", few, source_nll)
    for budget in parse_readings(arguments.budgets):
        for count in sorted(texts) if budget is FULL else [few]:
            measure("converted", str(budget), count, partial(model.token_nll, **attention(budget)))


if __name__ == "__main__":
    main()
