"""How fast `ssa prepare` turns text into shards, how much memory it takes, and how fast the loader reads them.

    ssa prepare TEXT --out data/bpe --train-bpe 16384
    python benchmarks/prepare.py data/bpe 'corpus/*.jsonl' 'corpus/*.jsonl.xz' --workers 2 --out benchmarks/results/cpu/prepare.json

MB are 10^6 bytes of UTF-8 text. CPU seconds are those of all processes, start-up included: where other programs share the cores they say
more than the wall clock does, whose load average is recorded. Memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ssa.data.loader import PackedLoader
from ssa.data.prefetch import Prefetcher
from ssa.data.shards import TOKENIZER, TokenShards, read_index
from ssa.data.sources import Reading, block_texts, expand_inputs, read_blocks
from ssa.runs.provenance import versions

LIBRARY_BYTES = 8_000_000


def cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measure_prepare(text: str, tokenizer: Path, workers: int, out: Path) -> dict[str, Any]:
    """One run of the command line in a process of its own."""
    command = ["-m", "ssa", "prepare", text, "--out", str(out), "--tokenizer", str(tokenizer), "--workers", str(workers)]
    load, cpu, start = os.getloadavg()[0], cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    wall, cpu = time.perf_counter() - start, cpu_seconds(resource.RUSAGE_CHILDREN) - cpu
    splits = read_index(out)["splits"].values()
    megabytes = sum(split["bytes"] for split in splits) / 1e6
    return {
        "input": "".join(Path(text).suffixes),
        "workers": workers,
        "text_mb": round(megabytes, 1),
        "tokens": sum(split["tokens"] for split in splits),
        "wall_seconds": round(wall, 2),
        "mb_per_second": round(megabytes / wall, 2),
        "cpu_seconds_per_mb": round(cpu / megabytes, 4),
        "mb_per_cpu_second": round(megabytes / cpu, 2),
        "peak_process_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3, 1),
        "load_average_before": round(load, 2),
    }


def measure_library(text: str, tokenizer: Path) -> dict[str, Any]:
    """The same vocabulary through the tokenizers library alone, on the first megabytes."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / TOKENIZER / "tokenizer.json"))
    texts, size = [], 0
    for block in read_blocks(expand_inputs([text]), Reading(document_bytes=256 << 10)):
        for one, _ in block_texts(block, "text"):
            texts.append(one)
            size += len(one.encode())
        if size >= LIBRARY_BYTES:
            break
    before = cpu_seconds(resource.RUSAGE_SELF)
    for start in range(0, len(texts), 64):
        backend.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
    cpu = cpu_seconds(resource.RUSAGE_SELF) - before
    return {"text_mb": round(size / 1e6, 1), "cpu_seconds_per_mb": round(cpu / size * 1e6, 4)}


def measure_loader(out: Path, context: int, rows: int, steps: int) -> dict[str, Any]:
    """Tokens a second of `PackedLoader` in one thread; and what a step of 50 ms waits with a `Prefetcher`."""
    loader = PackedLoader(TokenShards(out), context, rows, seed=0)
    for step in range(steps):  # opens the maps and draws the epoch's order
        loader.batch(step)
    start = time.process_time()
    for step in range(steps, 2 * steps):
        loader.batch(step)
    seconds = (time.process_time() - start) / steps
    waits = []
    with Prefetcher(loader.batch, 0, 20) as ahead:
        for step in range(20):
            time.sleep(0.05)
            ahead.get(step)
            waits.append(ahead.take_wait())
    return {
        "context": context,
        "rows": rows,
        "cpu_milliseconds_a_batch": round(seconds * 1e3, 2),
        "tokens_per_cpu_second": round(rows * context / seconds),
        "mean_wait_milliseconds_of_50_ms_steps": round(sum(waits) / len(waits) * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="a prepared directory with the BPE to use")
    parser.add_argument("texts", nargs="+", help="files or globs, each measured apart")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    index = read_index(arguments.tokenizer)
    results, loaders = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for text in arguments.texts:
            for workers in arguments.workers:
                out = Path(scratch, "shards")
                shutil.rmtree(out, ignore_errors=True)
                results.append(measure_prepare(text, arguments.tokenizer, workers, out))
                print(json.dumps(results[-1]), flush=True)
        for context, rows in ((4096, 16), (8192, 16), (32768, 4)):
            loaders.append(measure_loader(out, context, rows, steps=16))
            print(json.dumps(loaders[-1]), flush=True)
    names = " ".join(f"'*{''.join(Path(text).suffixes)}'" for text in arguments.texts)
    report = {
        "command": f"python benchmarks/prepare.py TOKENIZER {names} --workers {' '.join(map(str, arguments.workers))} --out OUT",
        "processor": processor(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "vocab_size": index["tokenizer"]["vocab_size"],
        "prepare": results,
        "tokenizers_library": measure_library(arguments.texts[0], arguments.tokenizer),
        "loader": loaders,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    """As Linux names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
