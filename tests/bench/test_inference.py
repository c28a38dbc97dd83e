"""What is made of the times of a model's steps; the times themselves take a GPU."""

import json

import pytest

from ssa.bench.inference import Points, auto_share, crossovers, prefill_bars, step_bars
from ssa.bench.plot import plot_results
from ssa.errors import UserError
from ssa.testing import tiny_config


def step(tokens, batch, mode, ms, of_floor=2.0):
    return {"what": "decode", "tokens": tokens, "batch": batch, "mode": mode, "ms": ms, "of_floor": of_floor}


def rows(batch, *points):
    return [step(tokens, batch, mode, ms) for tokens, *both in points for mode, ms in zip(("full", "sparse"), both, strict=True)]


def test_crossovers_lie_between_the_measurements_around_them():
    measured = [
        *rows(1, (1000, 1.0, 1.2), (2000, 1.1, 1.2), (4000, 1.5, 1.2)), *rows(2, (1000, 2.0, 1.0), (2000, 3.0, 1.0)),
        *rows(4, (1000, 1.0, 1.5), (2000, 1.0, 1.5)), *rows(8, (1000, 1.0, 0.5)),
    ]  # fmt: skip
    found = {one.batch: one.tokens for one in crossovers(measured, tiny_config(), "a GPU")}
    assert found == {1: 2500, 2: 1000, 4: None}  # 8: one point shows no crossing
    assert auto_share(measured, crossovers(measured, tiny_config(), "a GPU")) == 1.0
    wavering = rows(1, (1000, 1.0, 0.9), (2000, 1.0, 1.1), (4000, 2.0, 1.0))
    assert auto_share(wavering, crossovers(wavering, tiny_config(), "a GPU")) == pytest.approx(0.9)
    assert auto_share([], []) is None


def test_bars_are_of_what_was_measured_and_open_where_nothing_was():
    assert all(bar.value is None for bar in [*step_bars([]), *prefill_bars([])])
    measured = [step(1 << 17, 16, "full", 6.0), step(1 << 17, 16, "sparse", 2.0), step(8192, 1, "full", 1.0, 2.1)]
    bars = {bar.name: bar for bar in step_bars(measured)}
    assert bars["sparse over full, 131072 x 16"].value == 3.0 and bars["full step over its floor, 8192 x 1"].reached(2.1)
    prompts = [
        {"what": "prefill", "tokens": 8192, "mode": mode, "ms": ms, "extra_gb": 1.0}
        for mode, ms in (("sparse", 30.0), ("llama, sdpa", 45.0))
    ]
    assert next(bar.value for bar in prefill_bars(prompts)) == 1.5


def test_points():
    assert Points.parse("8k:1,128k:16").pairs == ((8192, 1), (131072, 16))
    for wrong in ("8k", "8k:0", "8k:x"):
        with pytest.raises(UserError, match=f"--points '{wrong}' is not TOKENS:ROWS"):
            Points.parse(wrong)


def test_a_picture_of_tokens_a_second(tmp_path):
    data = {
        "suite": "decode steps", "dtype": "bfloat16", "hardware": {"device": "A GPU"}, "versions": {"torch": "2"},
        "rows": [row | {"tokens_per_s": 1e3 / row["ms"]} for row in (*rows(1, (1024, 1.0, 2.0), (4096, 3.0, 2.0)), *rows(64, (4096, 9.0, 2.0)))],
    }  # fmt: skip
    (tmp_path / "steps.json").write_text(json.dumps(data))
    picture = plot_results(tmp_path / "steps.json", tmp_path / "steps.svg").read_text()
    assert "1 row" in picture and "tokens/s" in picture and "64 rows" not in picture
    for rows_left, match in (([], "no number of rows at several contexts"), ([{"what": "decode"}], "is not the JSON of `ssa bench decode --model`: KeyError")):  # fmt: skip
        (tmp_path / "steps.json").write_text(json.dumps(data | {"rows": rows_left}))
        with pytest.raises(UserError, match=match):
            plot_results(tmp_path / "steps.json", tmp_path / "steps.svg")
