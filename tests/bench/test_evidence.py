"""Who runs what, and the tables of what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED = BENCHMARKS / "results" / "h200" / "evidence"


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import evidence

    return evidence


def test_every_run_is_somebodys_and_all_end_together(evidence):
    names = list(evidence.RUNS)
    shares = [evidence.part_of(names, i, 4) for i in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    times = [sum(map(evidence.cost, share)) for share in shares]
    assert max(times) - min(times) <= max(map(evidence.cost, names))
    main = [evidence.part_of(names[:8], i, 4) for i in range(4)]
    assert ["ssa", "full"] in main  # the dearest with the cheapest, in the order of their worth


def test_lean_keeps_figures_and_drops_what_no_page_uses(evidence):
    value = {"tokens": 3, "curve": [{"loss": 1.23456789, "tokens": 5}], "path": Path("x")}
    assert evidence.lean(value) == {"tokens": 3, "curve": [{"loss": 1.23457}], "path": "x"}


def test_tables_of_the_committed_runs(tmp_path):
    """Means over seeds with half their distance; runs that were trained but not measured are named and left out."""
    for name in ("moba", "moba-seed-2"):
        (tmp_path / f"{name}.json").write_text((COMMITTED / f"{name}.json").read_text())
    (tmp_path / "full.json").write_text(json.dumps({"validation": {"full": 4.0}}))
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "evidence_tables.py"), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "full was not measured" in done.stderr
    losses = [json.loads((tmp_path / f"{name}.json").read_text())["validation"]["full"] for name in ("moba", "moba-seed-2")]
    mean, half = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
    assert f"| MoBA | {mean:.3f} ± {half:.3f} |" in done.stdout
    assert "| MoBA, seed 2 | " in done.stdout and "FullAttn" not in done.stdout
