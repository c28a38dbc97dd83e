"""What `benchmarks/nosa.py` makes of traces, and its runs."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # it shares the other experiments' helpers
spec = importlib.util.spec_from_file_location("nosa_benchmark", BENCHMARKS / "nosa.py")
nosa = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nosa)
sys.path.remove(str(BENCHMARKS))

TRACE = np.array([[0, 1, -1], [0, 2, 3], [0, 1, 3], [0, 1, 4]], dtype=np.int16)[None, None, None]


@pytest.mark.parametrize("slots, missed", [(3, (2 + 1 + 1) / 3), (4, (2 + 0 + 1) / 3), (9, (2 + 0 + 1) / 3)])
def test_misses_of_a_cache_that_drops_what_was_used_longest_ago(slots, missed):
    assert nosa.misses(TRACE, slots) == pytest.approx(missed)


def test_the_share_of_blocks_that_stay():
    assert nosa.kept_share(TRACE) == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize("name", [*nosa.RUNS, "nosa-seed-2"])
def test_its_runs_are_recipes(name):
    recipe = nosa.recipe_of(name, "data", ["--train.steps", "3"], "33m")
    assert recipe.data.context == 8192 and recipe.train.steps == 3 and recipe.model.num_selected_blocks == 16
    assert recipe.train.seed == (2 if "seed" in name else load_seed())


def load_seed():
    return nosa.load_recipe("33m").train.seed


def test_committed_traces_are_what_their_json_says():
    results = BENCHMARKS / "results" / "h200" / "nosa"
    for path in results.glob("*.npz"):
        trace = np.load(path)["trace"]
        assert trace.dtype == np.int16 and path.stat().st_size < 2_000_000
        figures = nosa.json.loads(path.with_suffix(".json").read_text())["figures"]["trace"]
        assert nosa.kept_share(trace) == pytest.approx(figures["gamma"], rel=1e-5)
