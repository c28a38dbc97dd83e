"""Runs, evaluations and benchmarks on disk as the commands leave them, from figures that no model had to make."""

import json
import math
import random

from ssa.eval.results import add_results

HEAD_FIGURES = ("kept_mass", "entropy_bits", "entropy_nats", "sink_mass_first", "sink_mass_first_4", "sink_mass_first_block",
                "own_block_mass", "output_error")  # fmt: skip


def head_means(rng, queries, heads):
    return {"queries": queries} | {name: [rng.random() for _ in range(heads)] for name in HEAD_FIGURES}


def layer_figures(rng, i, beyond, heads):
    first = [0, 1, 2, 4, 8, 16, 32, 64, 128]
    histogram = [[3, 4, 5, 9, 7], [1, 4, 5, 3, 7]]
    return {
        "layer": i, "all_queries": head_means(rng, 100, heads), "beyond_receptive_field": head_means(rng, 60, heads) if beyond else None,
        "by_position": {"first_position": first, "queries": [2] * 9, "kept_mass": [rng.random() for _ in first],
                        "entropy_bits": [rng.random() for _ in first]},
        "selected_blocks_mean": 3.5, "own_block_share": 0.3, "distance_histogram": [sum(x) for x in zip(*histogram, strict=True)],
        "distance_histogram_by_selector": histogram,
        "overlap": {"lags": [1, 2, 4], "pairs": [9, 8, 6], "gamma": [[0.9, 0.8, 0.7], [0.8, 0.7, 0.6]]} if beyond else None,
        "theorem_1": {"checked": 400, "violations": 0, "points": [[0.1, e := rng.random(), e * 2] for _ in range(20)]},
    }  # fmt: skip


def analysis_of(name="run", method="ssa", seed=0, beyond=True, layers=3, heads=4, gap=0.01):
    rng = random.Random(seed)
    predictions = {
        "tokens": 100, "kl_nats": 0.02, "top1_agreement": 0.9, "cross_entropy_full": 2.0, "cross_entropy_sparse": 2.0 + gap, "gap_nats": gap,
    }  # fmt: skip

    def inference():
        each = [layer_figures(rng, i, beyond, heads) for i in range(layers)]
        which = {}
        for key in ("all_queries", "beyond_receptive_field"):
            sets = [layer[key] for layer in each if layer[key] is not None]
            which[key] = {n: sum(sum(s[n]) for s in sets) / (len(sets) * heads) for n in HEAD_FIGURES} if sets else None
        return {**which, "layers": each}

    return {
        "format": 1, "run": name, "method": method, "step": 30, "budget": "4x16", "block_size": 16, "receptive_field": 64,
        "selection": "group / softmax / exact", "device": "cpu", "dtype": "float32", "versions": {"torch": "2"},
        "measured": {"data": "text", "split": "valid", "context": 256, "rows": 2, "tokens": 512, "seed": 0},
        "predictions": {"all_tokens": predictions, "beyond_receptive_field": predictions,
                        "by_position": {"first_position": [16, 32, 64], "tokens": [1, 2, 3], "kl_nats": [0.0, 0.01, 0.02]}},
        "inference": {mode: inference() for mode in ("sparse", "full")},
        "decode": {"prompt_tokens": 200, "steps": 64, "gamma": [[0.9, 0.95]] * layers} if beyond else None,
    }  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def trained(run, method="ssa", seed=1, steps=60):
    """A run directory after training."""
    write(run / "recipe.json", {"model": {"method": method}, "data": {}, "train": {"seed": seed, "lr": 0.1}})
    rng = random.Random(seed)
    aligned = 0.1 if method == "ssa" else None
    lines = [
        {"kind": "train", "step": i, "stream": "full", "lr": 1e-3, "tokens": 100 * i, "loss": 4 - i / 40, "cross_entropy": 4 - i / 40,
         "sparsity_loss": aligned, "commitment_loss": aligned, "grad_norm": 1 + rng.random(), "tokens_per_second": 1000.0,
         "mfu": 0.4, "peak_memory_gb": 3.5, "data_wait": 0.0, "loss_spike": i == 7, "kept_mass_layer_0": 0.7}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    lines += [{"kind": "valid", "step": i, "full": 3.0 - i / 100, "sparse": 3.1 - i / 100} for i in (20, 40, 60)]
    lines += [
        {"kind": "probe", "step": i, "budget": "4x16", "queries": 9}
        | {f"{name}_{mode}": 0.5 for name in ("kept_mass", "entropy_bits", "nll") for mode in ("full", "sparse")}
        for i in (20, 40)
    ]
    write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return run


def evaluated(run, nats, **setting):
    """RUN/eval/perplexity.json."""
    figures = {name: {"nats_per_token": x, "perplexity": math.exp(x)} for name, x in nats.items()}
    setting = {"text_sha256": "a", "context": 256, "stride": 256, "data": "text"} | setting
    add_results(
        run / "eval" / "perplexity.json", {"setting": setting, "model": {"step": 30, "method": "ssa"}, "budgets": figures}
    )


def answered(run, scores, notes=(), **setting):
    """RUN/eval/tasks.json; `scores` is {task: {budget: {metric: (mean, std, stderr)}}}."""
    for task, budgets in scores.items():
        figures = {
            budget: {"metrics": {m: {"mean": x[0], "std": x[1], "stderr": x[2], "by_seed": {"1": x[0], "12": x[0]} if x[1] else {}} for m, x in metrics.items()}}
            for budget, metrics in budgets.items()
        }  # fmt: skip
        entry = {
            "setting": {"task": task, "num_fewshot": 3} | setting,
            "model": {"step": 30, "method": "ssa"},
            "notes": list(notes),
            "budgets": figures,
        }
        add_results(run / "eval" / "tasks.json", entry)


def read_long(run, name="ruler", tasks=("niah_single_1", "vt"), lengths=(4096, 8192), offset=0.0):
    """RUN/eval/ruler.json."""
    cells = [
        {"task": t, "length": n, "score": max(0.0, 1 - i / 4 - j / 4 - offset), "standard_error": 0.02, "items": 10}
        for i, t in enumerate(tasks) for j, n in enumerate(lengths)
    ]  # fmt: skip
    budgets = {b: {"cells": cells, "score": 0.5, "seconds": 3.0} for b in ("full", "16x16")}
    add_results(
        run / "eval" / f"{name}.json", {"setting": {"tasks": list(tasks)}, "model": {"step": 30}, "notes": [], "budgets": budgets}
    )


def needled(run):
    """RUN/eval/needle.json with one cell not tested."""
    cells = [{"length": n, "depth": d, "cases": 2, "accuracy": 0.5 + d / 2} for n in (128, 256) for d in (0.0, 0.5, 1.0)]
    add_results(run / "eval" / "needle.json", {"setting": {}, "model": {"step": 30}, "budgets": {"4x16": {"grid": cells[:-1]}}})


def kernels(path):
    """A benchmark of kernels: sparse slower at 8k, faster at 32k."""
    rows = [
        {"shape": "16x16", "tokens": n, "dense": {"cudnn": {"forward": {"launches": d, "graph": d}, "both": 3 * d}, "flex": {"error": "left out"}},
         "ours": {"forward": {"launches": s, "graph": s / 4}, "both": {"launches": 2 * s, "graph": None}}}
        for n, d, s in ((8192, 1.0, 2.0), (32768, 16.0, 8.0))
    ]  # fmt: skip
    bars = [
        {
            "name": "forward at 32k",
            "bar": 1.5,
            "sense": ">=",
            "value": 2.0,
            "reached": True,
            "value_graph": 1.25,
            "reached_graph": False,
        }
    ]
    return write(
        path, {"command": "ssa bench", "hardware": {"device": "GPU"}, "versions": {"torch": "2"}, "rows": rows, "bars": bars}
    )


def compared(directory):
    """Measurements that are no times of kernels: groups of records, lists of them, curves, single figures."""
    command = {"command": "python compare.py", "device": "cpu", "versions": {"torch": "2"}}
    tasks = {t: {"limit": 4, "ways": {"ours": {"acc": 0.75}, "theirs": {"acc": 0.5}}} for t in ("piqa", "copa")}
    write(directory / "agreement.json", command | {"what": "ours beside theirs", "seed": 1, "tasks": tasks})
    curves = {"reference": [3.0, 2.0, 1.0], "triton": [3.0, 2.0, 1.5], "largest": 0.5}
    write(directory / "curves.json", command | curves)
    write(directory / "single.json", command | {"answer": 42, "checked": True})
    write(
        directory / "prepare.json", command | {"prepare": [{"input": "a", "mb": 2.0}], "loader": [{"context": 8, "wait": 0.25}]}
    )


def recorded(path):
    """A run, its evaluations of two texts and its analysis in one file, without single points and positions."""
    run = analysis_of("nsa", "nsa", 5)
    for mode in ("sparse", "full"):
        for layer in run["inference"][mode]["layers"]:
            del layer["theorem_1"], layer["by_position"], layer["all_queries"]

    def entry(nats, context):
        figures = {name: {"nats_per_token": x, "perplexity": math.exp(x)} for name, x in nats.items()}
        return {
            "setting": {"text_sha256": "b", "context": context, "stride": context},
            "model": {"step": 9, "method": "nsa"},
            "budgets": figures,
        }

    nothing = {"perplexity": None, "needle": None, "tasks": {}}
    cells = [{"length": 128, "depth": d, "cases": 2, "accuracy": d} for d in (0.0, 1.0)]
    needle = {"setting": {}, "model": {"step": 9}, "budgets": {"4x16": {"grid": cells}}}
    figures = {
        "valid": nothing | {"perplexity": entry({"4x16": 1.5, "full": 1.0}, 256)},
        "wikitext": nothing | {"perplexity": entry({"4x16": 2.5, "full": 2.0}, 512)},
        "needle": nothing | {"needle": needle},
        "analysis": run,
    }
    curve = [{"kind": "train", "step": i, "cross_entropy": 5 - i, "loss": 5 - i} for i in (1, 2, 3)]
    recipe = {"model": {"method": "nsa"}, "data": {}, "train": {"seed": 1}}
    return write(path, {"name": "nsa", "recipe": recipe, "curve": curve, "figures": figures})


def full_sample(directory):
    """Five runs (two of them seeds of one, one a record) with everything, measurements, and a file that nobody knows."""
    for name, method, seed in (("full", "full", 1), ("moba", "moba", 1), ("ssa", "ssa", 1), ("ssa-2", "ssa", 2)):
        run = trained(directory / name, method, seed)
        evaluated(run, {"4x16": 2.0 + seed / 10, "16x16": 1.9, "full": 1.8 + seed / 20})
        answered(run, {"piqa": {"full": {"acc": (0.5, 0.01, 0.02), "acc_norm": (0.7, 0.01, 0.02)}, "4x16": {"acc_norm": (0.6 + seed / 50, 0.02, 0.02)}},
                       "wikitext": {"full": {"word_perplexity": (15.5, 0.0, None)}}}, ["a note"])  # fmt: skip
        read_long(run, offset=seed / 10)
        needled(run)
        write(run / "analysis" / "analysis.json", analysis_of(name, method, seed, gap=seed / 100))
    kernels(directory / "bench" / "kernels.json")
    compared(directory / "bench")
    recorded(directory / "evidence" / "nsa.json")
    write(directory / "strange.json", {"what": 1})
    return directory
