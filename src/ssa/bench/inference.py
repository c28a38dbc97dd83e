"""`ssa bench decode --model` and `ssa bench prefill`: decoding steps and prompts of a whole model, full and sparse in the same engine, beside
transformers' Llama of the same shape. Weights are random, and so are the cached keys: neither changes what a step costs.

Before a point is timed, the step by graph is compared with the model's own layers.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.attention import AttentionCall
from ssa.bench.gate import GateError
from ssa.bench.llama import llama_like
from ssa.bench.report import Bar, Deadline, Report, environment
from ssa.bench.rows import vocabulary
from ssa.bench.shapes import parse_list, parse_tokens
from ssa.budget import AttentionMode
from ssa.config import Recipe
from ssa.device import device_name
from ssa.errors import UserError
from ssa.infer.crossover import Crossover, Shape, save_crossovers
from ssa.infer.decoder import PREFILL_CHUNK, Attention, Draw, Rows, decoded_tokens
from ssa.infer.speculate import AUTO_DRAFTS, Rounds, Speculation
from ssa.model import BlockCache, SSAConfig, SSAForCausalLM
from ssa.testing import rms_ratio

MODES: tuple[AttentionMode, ...] = ("full", "sparse")
STEPS = 60
ROOM = STEPS + 68
LOOP_TOKENS = 8192
CHECKED_KEYS = 1 << 21
"""Of rows times tokens: a larger cache is not copied for the comparison."""


@dataclass(frozen=True)
class Points:
    """Contexts, each with its numbers of rows."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Points:
        """ "8k:1,128k:16" -> ((8192, 1), (131072, 16))."""
        pairs = []
        for part in parse_list(text, "--points"):
            tokens, _, rows = part.partition(":")
            if not rows.isdecimal() or not int(rows):
                raise UserError(f"--points {part!r} is not TOKENS:ROWS; write e.g. 8k:1,128k:16")
            pairs.append((parse_tokens(tokens)[0], int(rows)))
        return cls(tuple(pairs))


def new_model(recipe: Recipe, longest: int, dtype: torch.dtype = torch.bfloat16) -> SSAForCausalLM:
    """The recipe's, with random weights on the GPU.

    Raises:
        UserError: no CUDA GPU.
    """
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a CUDA GPU, and PyTorch finds none here")
    torch.manual_seed(0)
    config = SSAConfig.from_recipe(recipe.model, vocabulary(recipe, None))
    config.max_position_embeddings = longest
    with torch.device("cuda"):
        model = SSAForCausalLM(config)
    return model.to(dtype).eval()


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(_times(lambda: target.copy_(source), 10))


def _times(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds on the device."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def filled_cache(model: SSAForCausalLM, rows: int, tokens: int, room: int) -> BlockCache:
    """A cache of random keys and values."""
    config, cache = model.config, BlockCache(tokens + room)
    like, bias = model.model.embed_tokens.weight, model.model.selector.adds_bias
    cache.open(config.num_hidden_layers, tokens)
    for layer in cache.layers:
        layer.reserve(tokens, rows, config.num_key_value_heads, config.head_dim, like, bias)
        for buffer in layer.buffers():
            for row in buffer:  # a row at a time: normal_ of 2^31 elements and more takes a copy in fp32
                row.normal_()
    return cache


def step_bytes(model: SSAForCausalLM, rows: int, tokens: int, mode: AttentionMode) -> int:
    """What a step of one token a row must read: all weights but the embedding's, and the keys and values (sparse: chosen ones, and means)."""
    config, itemsize = model.config, model.dtype.itemsize
    weights = sum(p.numel() * p.element_size() for p in model.model.layers.parameters()) + model.lm_head.weight.numel() * itemsize
    key = config.num_key_value_heads * config.head_dim * itemsize
    read = 2 * tokens
    if mode == "sparse":
        read = min(2 * config.budget.tokens + tokens // config.block_size, 2 * tokens)
    return weights + rows * config.num_hidden_layers * key * read


@torch.no_grad()
def measure_step(model: SSAForCausalLM, tokens: int, rows: int, mode: AttentionMode, bandwidth: float) -> dict[str, Any]:
    """Times of a step over `tokens` cached ones, greedy, by CUDA graph.

    Raises:
        GateError: it is not what the same step is, launched.
    """
    row: dict[str, Any] = {"what": "decode", "tokens": tokens, "batch": rows, "mode": mode}
    torch.cuda.synchronize()
    cache = filled_cache(model, rows, tokens, ROOM)
    ids, starts = torch.randint(0, 1000, (rows, 1), device="cuda"), torch.zeros(rows, dtype=torch.int64, device="cuda")
    calls, steps = model.model.decoding_calls(mode), model.model.steps
    if rows * tokens <= CHECKED_KEYS:
        _check(model, cache, ids, starts, mode)
        row["checked"] = True
    draw, before = Draw(), torch.cuda.memory_allocated()

    def choose(logits: Tensor) -> Tensor:
        chosen = draw(logits[:, -1])
        ids.copy_(chosen.clamp(min=0)[:, None])
        return chosen

    def step() -> Tensor:
        return steps.run(model, ids, cache, starts, calls, choose)

    started = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    row["cold_s"] = round(time.perf_counter() - started, 3)
    times = sorted(_times(step, STEPS - 5))
    row |= {
        "ms": 1e3 * statistics.median(times), "p99_ms": 1e3 * times[int(0.99 * len(times))],
        "graph_gb": (torch.cuda.memory_allocated() - before) / 1e9, "floor_ms": 1e3 * step_bytes(model, rows, tokens, mode) / bandwidth,
    }  # fmt: skip
    row |= {"of_floor": row["ms"] / row["floor_ms"], "tokens_per_s": rows / row["ms"] * 1e3}
    return row


def _check(model: SSAForCausalLM, cache: BlockCache, ids: Tensor, starts: Tensor, mode: AttentionMode) -> None:
    """A captured step is the launched one, bitwise; the cache is left as it was.

    Raises:
        GateError: it is not.
    """
    steps, calls, found = model.model.steps, model.model.decoding_calls(mode), []
    for graphs in (False, True, True, True):  # launched; as it is, captured, replayed
        steps.graphs = graphs
        found.append(steps.run(model, ids, cache, starts, calls).clone())
        cache.crop(-1)
    if not all(torch.equal(x, found[0]) for x in found):
        raise GateError("a replayed step is not the launched one")


@torch.no_grad()
def check_layers(recipe: Recipe) -> dict[str, float]:
    """Errors of steps through the fused layers against the model's own, two layers of the recipe in fp32: in bf16 random scores are near
    enough for rounding to choose other blocks.

    Raises:
        GateError: they are too large.
    """
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_hidden_layers=2))
    model = new_model(recipe, 4096, torch.float32)
    errors: dict[str, float] = {}
    for mode in MODES:
        cache, starts = filled_cache(model, 2, 3000, 8), torch.zeros(2, dtype=torch.int64, device="cuda")
        ids, calls = torch.randint(0, 1000, (2, 1), device="cuda"), model.model.decoding_calls(mode)
        found = model.model.steps.run(model, ids, cache, starts, calls).clone()
        cache.crop(-1)
        model.model.steps.fused = False
        errors[mode] = rms_ratio(found, model(ids, cache=cache, use_cache=True, attention_mode=mode).logits)
        model.model.steps.fused = True
        if not errors[mode] < 1e-3:
            raise GateError(f"not the logits of the model's own layers: off by {errors[mode]:.3g}")
    return errors


ROUNDS = 24
"""Of speculation that are timed, after half as many."""


@torch.no_grad()
def measure_speculation(
    model: SSAForCausalLM, tokens: int, rows: int, drafts: int = AUTO_DRAFTS, imposed_acceptance: float = 0.9
) -> dict[str, Any]:
    """Tokens a second of the speculating loop over `tokens` cached ones, greedy, against full attention's steps, and the speed-up that the times
    of its steps promise. With random weights sparse attention guesses right by chance alone, so a coin accepts drafts: timing does not mind.

    `promised` = (1 - a^(n+1)) / ((1 - a) (n s + v)) f for n drafts, the run's own acceptance a, and the seconds of a sparse step s, a verification
    v and a full step f, one right after the other.
    """
    n, inner, device = drafts, model.model, model.device
    batch = Rows(model, [[0]] * rows, 0, 0)
    batch.cache = filled_cache(model, rows, tokens, 6 * ROUNDS * (n + 1))
    newest_B, speculation = torch.randint(0, 1000, (rows,), device=device), Speculation(n, imposed=imposed_acceptance)
    rounds = Rounds(batch, newest_B, 2 * ROUNDS * (n + 1), Attention("full"), Draw(), speculation)
    for _ in rounds.several(ROUNDS // 2):  # compiles, captures
        pass
    before, started = (speculation.accepted, speculation.tested), time.perf_counter()
    written = sum(len(row) for new in rounds.several(ROUNDS) for row in new)
    seconds = time.perf_counter() - started
    a = (speculation.accepted - before[0]) / (speculation.tested - before[1])

    def likeliest(logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def step(queries: int, calls: Sequence[AttentionCall]) -> float:
        """Seconds of one of many."""
        ids_BT = torch.randint(0, 1000, (rows, queries), device=device)
        for count in (ROUNDS // 4, ROUNDS):
            began = time.perf_counter()
            for _ in range(count):
                inner.steps.run(model, ids_BT, batch.cache, batch.starts_B, calls, likeliest)
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - began) / ROUNDS

    s, v, f = step(1, rounds.draft_calls), step(n + 1, rounds.calls), step(1, inner.decoding_calls("full"))
    per_round = n + 1 if a == 1 else (1 - a ** (n + 1)) / (1 - a)
    row: dict[str, Any] = {
        "what": "speculate", "tokens": tokens, "batch": rows, "drafts": n, "imposed": imposed_acceptance, "acceptance": a,
        "tokens_a_round": written / ROUNDS / rows, "tokens_per_s": written / seconds, "full_tokens_per_s": rows / f,
        "sparse_ms": 1e3 * s, "verification_ms": 1e3 * v, "full_ms": 1e3 * f, "promised": per_round / (n * s + v) * f,
    }  # fmt: skip
    row["speedup"] = row["tokens_per_s"] / row["full_tokens_per_s"]
    row["of_promised"] = row["speedup"] / row["promised"]
    return row


@torch.no_grad()
def measure_loop(model: SSAForCausalLM, tokens: int, mode: AttentionMode, new: int = 128) -> dict[str, Any]:
    """What a user waits for, batch 1: the first token, and tokens a second, of `ssa generate`'s loop, of `model.generate`, and of the model's own
    layers called token by token."""
    prompt = torch.randint(0, 1000, (tokens,)).tolist()
    row: dict[str, Any] = {"what": "generate", "tokens": tokens, "batch": 1, "mode": mode, "new": new}

    def loop() -> Iterator[list[int]]:
        return decoded_tokens(model, [prompt], new, pad_id=0, attention=Attention(mode), draw=Draw())

    steps = model.model.steps
    for name, fused, graphs, count in (
        ("loop", True, True, new), ("loop, launched", True, False, 24), ("token by token", False, False, 24),
    ):  # fmt: skip
        steps.fused, steps.graphs = fused, graphs
        for _ in range(2):  # the first compiles
            started, arrivals = time.perf_counter(), []
            for _, _tokens in zip(range(count), loop(), strict=False):
                arrivals.append(time.perf_counter())
        gaps = sorted(b - a for a, b in itertools.pairwise(arrivals[4:]))
        row[name] = {
            "ttft_s": arrivals[0] - started, "tokens_per_s": (len(arrivals) - 1) / (arrivals[-1] - arrivals[0]),
            "p50_ms": 1e3 * statistics.median(gaps), "p99_ms": 1e3 * gaps[int(0.99 * len(gaps))],
        }  # fmt: skip
    steps.fused = steps.graphs = True
    ids = torch.tensor([prompt], device="cuda")
    seconds = []
    for count in (1, new, 1, new):
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            attention_mode=mode,
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    row["model.generate"] = {"tokens_per_s": (new - 1) / (seconds[3] - seconds[2])}
    return row


@torch.no_grad()
def measure_prefill(model: SSAForCausalLM, tokens: int, mode: AttentionMode, chunk: int = PREFILL_CHUNK) -> dict[str, Any]:
    """Milliseconds and GB beside the weights until the logits of the last of `tokens` are there, keys cached."""
    prompt = torch.randint(0, 1000, (tokens,)).numpy()

    def run() -> Any:
        return Rows(model, [prompt], 1, 0).prefill(Attention(mode), chunk)

    return {"what": "prefill", "tokens": tokens, "mode": mode, "chunk": chunk, **_long_call(run)}


@torch.no_grad()
def measure_llama(model: Any, tokens: int) -> dict[str, Any]:
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    return {
        "what": "prefill",
        "tokens": tokens,
        "mode": "llama, sdpa",
        **_long_call(lambda: model(ids, use_cache=True, logits_to_keep=1)),
    }


def _long_call(call: Callable[[], Any]) -> dict[str, float]:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(3):
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return {"ms": 1e3 * min(times), "extra_gb": (torch.cuda.max_memory_allocated() - before) / 1e9}


def bench_steps(recipe: Recipe, points: Points, out: Path | None, budget_seconds: float, save: bool) -> int:
    """Decoding: measure, write, print; 1 where a result was wrong (such a point is not timed)."""
    model = new_model(recipe, max(LOOP_TOKENS, *(tokens for tokens, _ in points.pairs)) + ROOM)
    report = _report("decode steps", recipe, out, budget_seconds)
    report.data["errors"] = check_layers(recipe)
    bandwidth = report.data["copy_tb_per_s"] = copy_bandwidth()
    for tokens, rows in points.pairs:
        for mode in MODES:
            if report.out_of_time(f"{tokens} tokens, {rows} rows, {mode}"):
                continue
            try:
                row = measure_step(model, tokens, rows, mode, bandwidth)
            except GateError as error:
                report.data["failures"].append(f"{tokens} tokens, {rows} rows, {mode}: {error}")
                print(f"not timed: {report.data['failures'][-1]}", flush=True)
                continue
            report.add(row)
            print(
                f"{mode} {tokens} x {rows}: {row['ms']:.3f} ms, {row['of_floor']:.2f} of its floor, {row['tokens_per_s']:.0f} tokens/s",
                flush=True,
            )
            gc.collect()
            torch.cuda.empty_cache()
    if (1 << 17, 16) in points.pairs and not report.out_of_time("speculation"):
        row = measure_speculation(model, 1 << 17, 16)
        report.add(row)
        print(
            "speculation, {drafts} drafts: {speedup:.2f}x of full steps, {of_promised:.2f} of what its steps promise".format(
                **row
            ),
            flush=True,
        )
        gc.collect()
        torch.cuda.empty_cache()
    if not report.out_of_time("generate"):
        for mode in MODES:
            row = measure_loop(model, LOOP_TOKENS, mode)
            report.add(row)
            print({name: round(x["tokens_per_s"], 1) for name, x in row.items() if isinstance(x, dict)}, flush=True)
    found = crossovers(report.data["rows"], model.config, device_name(model.device))
    report.data["crossovers"] = [vars(one) for one in found]
    share = auto_share(report.data["rows"], found)
    report.finish([*step_bars(report.data["rows"]), Bar("auto against the better of full and sparse, the least", 0.97, share)])
    if save:
        print(f"saved {save_crossovers(found)}")
    return 1 if report.data["failures"] else 0


def bench_prefill(recipe: Recipe, tokens: str, chunk: int, out: Path | None, budget_seconds: float) -> int:
    """Prompts: measure, write, print."""
    lengths = parse_tokens(tokens)
    model = new_model(recipe, max(lengths) + 1)
    report = _report("prefill", recipe, out, budget_seconds)
    for length in lengths:
        for mode in MODES:
            if not report.out_of_time(f"{length} tokens, {mode}"):
                report.add(measure_prefill(model, length, mode, chunk))
                print("{mode} {tokens}: {ms:.1f} ms, {extra_gb:.2f} GB".format(**report.data["rows"][-1]), flush=True)
    config = model.config
    del model
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        llama = llama_like(config).to(torch.bfloat16).eval()
    for length in lengths:
        if not report.out_of_time(f"{length} tokens, Llama"):
            report.add(measure_llama(llama, length))
            print("{mode} {tokens}: {ms:.1f} ms, {extra_gb:.2f} GB".format(**report.data["rows"][-1]), flush=True)
    report.finish(prefill_bars(report.data["rows"]))
    return 0


def _report(suite: str, recipe: Recipe, out: Path | None, budget_seconds: float) -> Report:
    return Report(
        out, Deadline(budget_seconds), suite=suite, dtype="bfloat16", recipe=recipe.to_dict(), failures=[],
        **environment(f"cuda:{torch.cuda.current_device()}"),
    )  # fmt: skip


def crossovers(rows: list[dict[str, Any]], config: SSAConfig, device: str) -> list[Crossover]:
    """Of each number of rows measured at several contexts: where sparse steps become no slower, on the line between measurements."""
    found = []
    for batch in sorted({row["batch"] for row in rows if row["what"] == "decode"}):
        ms = {(row["tokens"], row["mode"]): row["ms"] for row in rows if row["what"] == "decode" and row["batch"] == batch}
        lengths = sorted(tokens for tokens, mode in ms if mode == "full" and (tokens, "sparse") in ms)
        if len(lengths) < 2:
            continue
        lost = {tokens: ms[tokens, "sparse"] - ms[tokens, "full"] for tokens in lengths}
        slower = [tokens for tokens in lengths if lost[tokens] > 0]
        tokens: int | None = lengths[0]
        if slower and slower[-1] == lengths[-1]:
            tokens = None
        elif slower:
            low, high = slower[-1], lengths[lengths.index(slower[-1]) + 1]
            tokens = round(low + (high - low) * lost[low] / (lost[low] - lost[high]))
        found.append(Crossover(device, Shape.of(config), batch, tokens))
    return found


def auto_share(rows: list[dict[str, Any]], found: list[Crossover]) -> float | None:
    """The least, over points, of the better mode's time over that of the mode that auto takes."""
    ms = {(row["tokens"], row["batch"], row["mode"]): row["ms"] for row in rows if row["what"] == "decode"}
    limits = {one.batch: math.inf if one.tokens is None else one.tokens for one in found}
    shares = []
    for tokens, batch, mode in ms:
        if batch in limits and mode == "full" and (tokens, batch, "sparse") in ms:
            taken = "full" if tokens < limits[batch] else "sparse"
            shares.append(min(ms[tokens, batch, other] for other in MODES) / ms[tokens, batch, taken])
    return min(shares, default=None)


def step_bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The promises about decoding, of what was measured."""
    ms = {(row["tokens"], row["batch"], row["mode"]): row for row in rows if row["what"] == "decode"}
    bars = []
    for tokens, batch, bar in ((1 << 17, 16, 2.8), (1 << 17, 32, 4.2), (1 << 15, 64, 3.0)):
        full, sparse = ms.get((tokens, batch, "full")), ms.get((tokens, batch, "sparse"))
        bars.append(Bar(f"sparse over full, {tokens} x {batch}", bar, full["ms"] / sparse["ms"] if full and sparse else None))
    for mode, bar in (("full", 2.2), ("sparse", 2.3)):
        row = ms.get((8192, 1, mode))
        bars.append(Bar(f"{mode} step over its floor, 8192 x 1", bar, row["of_floor"] if row else None, "<="))
    loops = {row["mode"]: row for row in rows if row["what"] == "generate" and row["tokens"] == 8192}
    loop = loops.get("sparse")
    ratio = loop["loop"]["tokens_per_s"] / loop["token by token"]["tokens_per_s"] if loop else None
    row = next((row for row in rows if row["what"] == "speculate"), None)
    return [
        *bars,
        Bar("generate over token by token, 8192 x 1, sparse", 12, ratio),
        Bar("speculation over full steps, 131072 x 16, acceptance .9", 1.5, row["speedup"] if row else None),
        Bar("speculation over what its steps promise, 131072 x 16", 0.9, row["of_promised"] if row else None),
    ]


def prefill_bars(rows: list[dict[str, Any]]) -> list[Bar]:
    found = {(row["tokens"], row["mode"]): row for row in rows}
    bars = []
    for tokens, bar in ((8192, 1.6), (1 << 15, 2.4), (1 << 17, 4.3)):
        ours, llama = found.get((tokens, "sparse")), found.get((tokens, "llama, sdpa"))
        bars.append(Bar(f"prefill over Llama, SDPA, {tokens}", bar, llama["ms"] / ours["ms"] if ours and llama else None))
    longest = found.get((1 << 17, "sparse"))
    return [*bars, Bar("extra GB of a prompt of 131072", 2, longest["extra_gb"] if longest else None, "<=")]
