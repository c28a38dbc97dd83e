"""The command line of the benchmarks. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from ssa.config import load_recipe
from ssa.errors import UserError


def bench_kernels(
    shapes: str = "32/2/64:16x16,32/2/64:32x32,32/8/128:16x64",
    tokens: str = "",
    peers: str = "auto",
    quick: bool = False,
    budget_seconds: float = 0,
    out: str = "",
) -> int:
    """Time selection and block-sparse attention beside dense attention, fla-core and FlashMoBA, once the results are right (CUDA).

    Args:
        shapes: Comma-separated QUERY_HEADS/KV_HEADS/HEAD_SIZE:BLOCKSxSIZE; 16x16 alone stands for 32/2/64:16x16. @head at the end: every
            query head chooses for itself.
        tokens: Comma-separated lengths; 8k,32k,128k if left out.
        peers: Comma-separated: cudnn, flash, efficient, flex, fla, flash-moba; auto = all that are installed.
        quick: cuDNN and fla alone, up to 32k, few repeats.
        budget_seconds: Skip the rows that are left after so many seconds; 0 = measure all.
        out: JSON file for the results.
    """
    from ssa.bench import kernels

    return kernels.bench_kernels(kernels.plan(shapes, tokens, peers, quick), Path(out) if out else None, budget_seconds)


def bench_decode(
    shapes: str = "32/2/64:16x16,32/2/64:32x32,32/8/128:16x64",
    tokens: str = "8k,32k,128k",
    batches: str = "1,8,32",
    queries: int = 1,
    flex: bool = False,
    model: str = "",
    points: str = "2k:1,2k:16,8k:1,8k:16,32k:1,32k:16,32k:64,128k:1,128k:16,128k:32",
    save: bool = False,
    budget_seconds: float = 0,
    out: str = "",
) -> int:
    """Time a decoding step of one layer, or of a whole model, selection and attention, beside dense attention, once the results are right (CUDA).

    Args:
        shapes: Comma-separated QUERY_HEADS/KV_HEADS/HEAD_SIZE:BLOCKSxSIZE; 16x16 alone stands for 32/2/64:16x16.
        tokens: Comma-separated numbers of cached tokens.
        batches: Comma-separated numbers of rows.
        queries: Tokens that a row decodes at once; dense attention is timed beside 1.
        flex: Time compiled FlexAttention, too; it compiles for a minute.
        model: A recipe or preset, e.g. 1b: the steps of a whole model with random weights by CUDA graph, full and sparse, instead.
        points: With model, comma-separated TOKENS:ROWS.
        save: With model, keep what mode auto goes by on this device.
        budget_seconds: Skip the rows that are left after so many seconds; 0 = measure all.
        out: JSON file for the results.
    """
    if model:
        from ssa.bench import inference

        recipe = load_recipe(model, [])
        return inference.bench_steps(recipe, inference.Points.parse(points), Path(out) if out else None, budget_seconds, save)
    if save:
        raise UserError("--save keeps what a whole model's steps take: name one, e.g. --model 1b")
    from ssa.bench import decode

    return decode.bench_decode(decode.plan(shapes, tokens, batches, queries, flex), Path(out) if out else None, budget_seconds)


def bench_prefill(
    model: str = "1b", tokens: str = "8k,32k,128k", chunk: int = 8192, budget_seconds: float = 0, out: str = ""
) -> int:
    """Time how long a whole model takes over a prompt, full and sparse, beside transformers' Llama of the same shape (CUDA).

    Args:
        model: A recipe or preset; the weights are random.
        tokens: Comma-separated lengths of prompts.
        chunk: Tokens computed at once.
        budget_seconds: Skip the rows that are left after so many seconds; 0 = measure all.
        out: JSON file for the results.
    """
    from ssa.bench import inference

    return inference.bench_prefill(load_recipe(model, []), tokens, chunk, Path(out) if out else None, budget_seconds)


def bench_train(
    config: str = "1b",
    /,
    variants: str = "full,moba,nsa,ssa,llama",
    rows: str = "plain",
    data: str = "",
    sharing: str = "",
    seconds: float = 10,
    budget_seconds: float = 0,
    out: str = "",
    *,
    overrides: list[str],
) -> int:
    """Time training steps of each method, and of transformers' Llama of the same shape, in one run; torchrun adds several ranks.

    Args:
        config: A recipe file, or a preset. Model, context, batch_size and how layers and ranks run are the recipe's.
        variants: Comma-separated: full, moba, nsa, ssa, llama, llama-bf16 (weights and optimizer in bfloat16).
        rows: Comma-separated: plain (a document a row), packed (several).
        data: A prepared directory to read; random tokens if left out.
        sharing: With torchrun, comma-separated: ddp, fsdp, fsdp-kept (weights stay gathered until the backward pass), hsdp; the recipe's if left out.
        seconds: Of measured steps for each variant.
        budget_seconds: Skip the variants that are left after so many seconds; 0 = measure all.
        out: JSON file for the results.
    """
    recipe = load_recipe(config, overrides)
    from ssa.bench import train

    return train.bench_train(
        recipe, train.plan(variants, rows, seconds, data, sharing), Path(out) if out else None, budget_seconds
    )


def bench_plot(results: str, /, out: str = "kernels.svg") -> None:
    """Draw where sparse attention overtakes dense attention, from the JSON of `ssa bench kernels` or of `ssa bench decode --model` (matplotlib).

    Args:
        results: The JSON file.
        out: Picture; .svg, .png or .pdf.
    """
    from ssa.bench.plot import plot_results

    print(plot_results(Path(results), Path(out)))
