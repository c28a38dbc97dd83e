"""The verbs that use a model, or look at what there is for it. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Literal, TextIO, cast

from ssa.budget import parse_reading
from ssa.cli.metavars import BUDGET, DEVICE, DTYPE, FILE, OPTIONAL_RUN, OUT, RUN, SOURCE, TEXT
from ssa.terminal import Visible, say


def generate(
    run: RUN,
    /,
    prompt: tuple[TEXT, ...] = (),
    prompt_file: FILE = "",
    mode: Literal["", "sparse", "full", "auto"] = "",
    budget: BUDGET = "",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[TEXT, ...] = (),
    batch_size: int = 16,
    prefill_mode: Literal["", "sparse", "full"] = "",
    prefill_chunk: int = 8192,
    speculate: str = "0",
    graphs: bool = True,
    stream: bool = True,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Continue prompts, in sparse or full mode.

    Args:
        run: A run, one of its checkpoints, or a model directory.
        prompt: Prompts; several are batched.
        prompt_file: A file whose whole text is a prompt; "-" reads standard input.
        mode: sparse or full; auto = full up to where sparse is no slower on this device; the model's own if left out.
        budget: kxs, blocks a token may read; the model's own if left out.
        max_new_tokens: Most tokens to generate for a prompt.
        temperature: 0 = greedy.
        top_k: Sample among so many; 0 = all.
        top_p: Sample within this probability mass.
        seed: Seed of the sampling.
        stop: Texts that end a continuation.
        batch_size: Prompts at a time.
        prefill_mode: How prompts are read, sparse or full; like what follows if left out.
        prefill_chunk: Tokens of a prompt computed at once; fewer take less memory.
        speculate: Tokens that sparse attention drafts (at --budget) for full attention to verify in one pass, 1 to 7: the same text, faster where contexts are long. auto: only where it is faster; 0 = none.
        graphs: On a GPU launch a step as one CUDA graph.
        stream: Print while generating.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32 or bfloat16.
    """
    if budget:
        parse_reading(budget)
    from ssa.infer import engine

    # On a terminal what a model writes must not move the cursor; into a pipe or a file it goes as it is.
    out: Any = Visible(sys.stdout) if sys.stdout.isatty() else sys.stdout
    texts = engine.read_prompts(list(prompt), prompt_file or None, None if sys.stdin is None or sys.stdin.isatty() else sys.stdin)
    engine.generate(
        run, texts, mode=mode or None, budget=budget or None, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
        top_p=top_p, seed=seed, stop=stop, batch_size=batch_size, prefill_mode=prefill_mode or None, prefill_chunk=prefill_chunk, speculate=speculate, graphs=graphs, stream=stream, device=device, dtype=dtype, out=out,
        err=sys.stderr,
    )  # fmt: skip


def chat(
    run: RUN,
    /,
    mode: Literal["", "sparse", "full", "auto"] = "",
    budget: BUDGET = "",
    system: TEXT = "",
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    prefill_mode: Literal["", "sparse", "full"] = "",
    prefill_chunk: int = 8192,
    graphs: bool = True,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
) -> None:
    """Talk with a model; reads lines from standard input where that is no terminal.

    Args:
        run: A run, one of its checkpoints, or a model directory.
        mode: sparse, full or auto; the model's own if left out. /mode changes it.
        budget: kxs, blocks a token may read; the model's own if left out. /budget changes it.
        system: What the model is told first. /system changes it.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 = greedy.
        top_k: Sample among so many; 0 = all.
        top_p: Sample within this probability mass.
        seed: Seed of the sampling.
        prefill_mode: How messages are read, sparse or full; like what follows if left out.
        prefill_chunk: Tokens of a message computed at once; fewer take less memory.
        graphs: On a GPU launch a step as one CUDA graph.
        device: auto, cpu, cuda, cuda:1, ...
        dtype: auto, float32 or bfloat16.
    """
    if budget:
        parse_reading(budget)
    from ssa.infer.chat import chat as chat_with

    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not on every system: lines can be edited, and called up again
            import readline  # noqa: F401
    chat_with(
        run, input if terminal else _next_line, mode=mode or None, budget=budget or None, system=system, max_new_tokens=max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, prefill_mode=prefill_mode or None, prefill_chunk=prefill_chunk, graphs=graphs,
        device=device, dtype=dtype, out=cast(TextIO, Visible(sys.stdout) if sys.stdout.isatty() else sys.stdout), err=sys.stderr, prompts=terminal,
    )  # fmt: skip


def _next_line(prompt: str) -> str:
    line = "" if sys.stdin is None else sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def convert(
    source: SOURCE,
    out: OUT,
    /,
    to: Literal["ssa", "llama", "llama-nsa", "nosa", "minicpm"] = "ssa",
    method: str = "",
    selector: str = "",
    block_size: int = 0,
    num_selected_blocks: int = 0,
    selection_rule: Literal["", "exact", "released"] = "",
    gate: bool = True,
    dtype: Literal["", "float32", "bfloat16", "float16"] = "",
    overwrite: bool = False,
) -> None:
    """Turn a Llama, or a released SSA, NOSA or MiniCPM4 checkpoint into ours, or ours into theirs.

    Args:
        source: A run, a model directory, a .gguf file, or the name of a model on the hub.
        out: Directory for the result.
        to: The layout to write.
        method: How the result attends: full, moba, nsa, ssa, or one that another package registers. A Llama becomes ssa, NOSA and MiniCPM4 become moba, a released checkpoint keeps its own.
        selector: How blocks are chosen; the source's if left out. One that is new to the source starts with fresh weights.
        block_size: Tokens of a block; the source's if 0.
        num_selected_blocks: Blocks a query may read; the source's if 0.
        selection_rule: exact, or released as the authors' kernel selects; released checkpoints keep released.
        gate: Give the result a gate; it starts constant, so that the function is preserved. NOSA and MiniCPM4 get none.
        dtype: Precision of the weights; the source's if left out.
        overwrite: Replace the model that is in OUT.
    """
    from ssa.model.convert import convert as convert_model

    report = convert_model(
        source, out, to=to, method=method or None, selector=selector or None, block_size=block_size or None,
        num_selected_blocks=num_selected_blocks or None, selection_rule=selection_rule or None, gate=None if gate else False,
        dtype=dtype or None, overwrite=overwrite,
    )  # fmt: skip
    say(report)


def doctor(run: OPTIONAL_RUN = None, /) -> int:
    """Say what is installed, which devices and implementations will be used, and try a tiny model; or look over a run.

    Args:
        run: A run, a checkpoint or a model directory: its hashes, configuration, tokenizer and data are checked, and nothing else.
    """
    if run is not None:
        from ssa.examine_run import examine_run

        return examine_run(run)
    from ssa.doctor import examine

    return examine()
