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


def test_every_run_has_a_cost(evidence):
    """Ablations cost what SSA does; what differs is named."""
    assert evidence.cost("ssa-alpha-5") == evidence.cost("ssa-seed-2") == evidence.COSTS["ssa"]
    assert evidence.cost("ssa-no-alignment") < evidence.cost("ssa") and all(evidence.cost(name) >= 1 for name in evidence.RUNS)


def test_lean_keeps_figures_and_drops_what_no_page_uses(evidence):
    value = {"tokens": 3, "curve": [{"loss": 1.23456789, "tokens": 5}], "path": Path("x")}
    assert evidence.lean(value) == {"tokens": 3, "curve": [{"loss": 1.23457}], "path": "x"}


def test_tables_of_the_committed_runs(tmp_path):
    """Means over seeds with half their distance; a run that was trained but not measured is left out."""
    for name in ("moba", "moba-seed-2"):
        (tmp_path / f"{name}.json").write_text((COMMITTED / f"{name}.json").read_text())
    (tmp_path / "full.trained.json").write_text(json.dumps({"validation": {"full": 4.0}}))
    done = subprocess.run([sys.executable, str(BENCHMARKS / "evidence_tables.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [json.loads((tmp_path / f"{name}.json").read_text())["validation"]["full"] for name in ("moba", "moba-seed-2")]
    mean, half = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
    assert f"| MoBA | {mean:.3f} ± {half:.3f} |" in done.stdout
    assert "| MoBA, seed 2 | " in done.stdout and "FullAttn" not in done.stdout
