"""A budget for each layer, found on a text: the ladder, the choice, the model that is written, and what reads it."""

import io
import json
import math
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from ssa.analysis.analyze import analyze
from ssa.analysis.attention_stats import SparsityMeter, selection_of
from ssa.analysis.kept_mass import KeptMass, kept_mass
from ssa.analysis.measure import measure_model
from ssa.analysis.sparsity import attention_figures
from ssa.analysis.tune_budget import Ladder, ladder_steps, tune_budget, uniform_budgets
from ssa.budget import FULL, Budget, LayerBudgets, Selection
from ssa.cli import main
from ssa.data.tokenizer import byte_tokenizer
from ssa.errors import UserError
from ssa.eval.evaluate import evaluate
from ssa.infer.engine import generate
from ssa.infer.load import load_model
from ssa.model.stored import read_config
from ssa.ops import select_blocks
from ssa.report.report import write_analysis_report, write_report
from ssa.testing import document_positions, random_qkv, tiny_config, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 12
WINDOWS = {"selector": "windows", "selector_options": {"mean_size": 4, "mean_stride": 2, "local_blocks": 1}}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def make_run(tmp_path):
    def make(method="moba", name="model", **changes):
        path = tmp_path / name
        tiny_model(method, **{"initializer_range": 0.5, "num_hidden_layers": 3} | changes).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        return path

    return make


def tuned(run, text, **options):
    said = io.StringIO()
    options = {"target": 0.9, "context": 80, "max_tokens": 240, "device": "cpu"} | options
    return tune_budget(run, data=text, console=Console(file=said, width=120), **options), said.getvalue()


@pytest.mark.parametrize("scope", ["group", "head"])
@pytest.mark.parametrize("tile", [None, 37])
def test_kept_mass_is_that_of_the_figures(scope, tile):
    q, k, v = (x.detach() for x in random_qkv(2, 30, 30, 4, 2, 8, dtype=torch.float32))
    positions = document_positions([11, 19], 2)
    bias = torch.randn(2, 30, 2)
    choices = [select_blocks(q, k, Selection(n, 4, scope=scope), positions=positions)[0] for n in (1, 2, 5)]
    found = kept_mass(q, k, choices, positions, block_size=4, bias=bias, tile=tile)
    for index, each in zip(choices, found, strict=True):
        figures = attention_figures(q, k, v, index, block_size=4, positions=positions, bias=bias)
        torch.testing.assert_close(each, figures.kept)
    assert float(found[0].min()) < 0.9


def test_cached_queries_are_the_last_ones():
    q, k, _ = (x.detach() for x in random_qkv(1, 21, 21, 4, 2, 8, dtype=torch.float32))
    index = select_blocks(q, k, Selection(2, 4))[0]
    (whole,) = kept_mass(q, k, [index], torch.arange(21)[None], block_size=4)
    (late,) = kept_mass(q[:, 15:], k, [index[:, :, 15:]], torch.arange(15, 21)[None], block_size=4)
    torch.testing.assert_close(late, whole[:, 15:])


@pytest.mark.parametrize("changes", [{}, {"method": "full"}, {"method": "nsa"}, {"selection_scope": "head"}, WINDOWS])
def test_the_least_step_that_keeps_enough_is_chosen(make_run, text, changes):
    run = make_run(**changes)
    figures, said = tuned(run, text)
    steps, kept = figures["ladder"]["blocks"], figures["ladder"]["kept_mass"]
    assert steps[0] == (3 if "selector" in changes else 1) and steps[-1] == "full" and len(steps) > 4
    for layer, budget in zip(kept, figures["layer_budgets"], strict=True):
        assert all(a <= b + 1e-6 for a, b in pairwise(layer)) and layer[0] < 0.9 and layer[-1] == 1
        at = next(i for i, mass in enumerate(layer) if mass >= 0.9)
        assert budget == ("full" if steps[at] == "full" else f"{steps[at]}x4")
        assert f"{budget:>6}   {layer[at]:>9.4f}" in said
    assert figures["beyond"] == 12 and figures["measured"]["tokens"] == 240
    assert read_config(run).layer_budgets is None, "the source stays as it is"
    assert main_blocks(figures["layer_budgets"]) == main_blocks(figures["compared"]["uniform"]["layer_budgets"])


def main_blocks(budgets):
    """Over all layers, of 20 there are."""
    return sum(20 if budget == "full" else int(budget.partition("x")[0]) for budget in budgets)


def test_the_ladder_and_the_run_have_the_analyses_figures(make_run, text):
    run = make_run()
    figures, _ = tuned(run, text)
    (by_hand,) = analyze(
        [run], data=text, context=80, max_tokens=240, budget="3x4", device="cpu", decode_steps=0, console=quiet()
    ).runs
    full = by_hand.analysis["inference"]["full"]["layers"]
    at = figures["ladder"]["blocks"].index(3)
    for layer, kept in zip(full, figures["ladder"]["kept_mass"], strict=True):
        means = layer["beyond_receptive_field"]["kept_mass"]
        assert kept[at] == pytest.approx(sum(means) / len(means), abs=1e-5)
    (own,) = analyze(
        [run.with_name("model-tuned")], data=text, context=80, max_tokens=240, device="cpu", decode_steps=0, console=quiet()
    ).runs
    predictions, side = own.analysis["predictions"]["all_tokens"], figures["compared"]["tuned"]
    assert side["kl_nats"] == pytest.approx(predictions["kl_nats"], rel=1e-5)
    assert side["perplexity"] == pytest.approx(math.exp(predictions["cross_entropy_sparse"]), rel=1e-5)
    assert figures["compared"]["full"]["perplexity"] == pytest.approx(math.exp(predictions["cross_entropy_full"]), rel=1e-5)


def quiet():
    return Console(file=io.StringIO(), width=100)


def test_the_written_model_is_read_by_its_budgets_everywhere(make_run, text, tmp_path):
    run, out = make_run(), tmp_path / "by-layer"
    figures, said = tuned(run, text, out=out)
    budgets = LayerBudgets.parse(figures["layer_budgets"])
    assert read_config(out).budget == budgets and str(out) in said.replace("\n", "")
    assert json.loads((out / "tune_budget.json").read_text()) == figures
    assert (out / "model.safetensors").samefile(run / "model.safetensors")
    # generate
    summary = io.StringIO()
    (own,) = generate(out, ["The quick brown fox jumps"], max_new_tokens=24, device="cpu", err=summary)
    plain, tokenizer = load_model(run, "cpu")
    prompt = tokenizer("The quick brown fox jumps", return_tensors="pt").input_ids
    asked = plain.generate(prompt, max_new_tokens=24, do_sample=False, budget=tuple(figures["layer_budgets"]))
    assert own.token_ids[:20] == asked[0, prompt.shape[1] :].tolist()[:20] and len(own.token_ids) >= 20
    assert f"sparse attention, {budgets}" in summary.getvalue()
    # eval
    result = evaluate(out, data=text, context=80, max_tokens=200, device="cpu", needle_lengths=())
    entry = result["perplexity"]
    assert list(entry["budgets"]) == [str(budgets), "full"] and entry["model"]["own_budget"] == str(budgets)
    ids = torch.tensor([byte_tokenizer()(TEXT[:81]).input_ids[:80]])
    nll = plain.token_nll(ids, budget=tuple(figures["layer_budgets"])).mean().item()
    short = evaluate(out, data=text, context=80, max_tokens=79, device="cpu", out=tmp_path / "short")["perplexity"]
    assert short["budgets"][str(budgets)]["nats_per_token"] == pytest.approx(nll, rel=1e-5)
    # analyze, and its page
    analysis = analyze([out], data=text, context=80, max_tokens=240, device="cpu", decode_steps=4, console=quiet())
    assert analysis.runs[0].analysis["budget"] == str(budgets)
    assert analysis.runs[0].analysis["layer_budgets"] == figures["layer_budgets"]
    assert str(budgets) in write_analysis_report(analysis).read_text()
    page = tmp_path / "page.html"
    assert not write_report([out], page).problems and str(budgets) in page.read_text()


def test_layers_that_read_everything_keep_everything_in_analyses():
    model, ids = tiny_model("moba", layer_budgets=["full", "2x4"]), torch.randint(258, (2, 40))
    positions = torch.arange(40).expand(2, -1)
    figures = measure_model(model, ids, positions, model.config.budget, decode_steps=3)
    for mode in ("sparse", "full"):
        first, second = figures["inference"][mode]["layers"]
        assert first["beyond_receptive_field"]["kept_mass"] == pytest.approx([1.0] * 4)
        assert first["beyond_receptive_field"]["queries"] == second["beyond_receptive_field"]["queries"] == 2 * 32
        assert first["overlap"] is None and second["overlap"] is not None
        assert max(second["beyond_receptive_field"]["kept_mass"]) < 1
    assert len(figures["decode"]["gamma"]) == 1, "of the layer that chooses"
    by_hand = model.token_nll(ids, attention_mode="sparse", position_ids=positions).mean().item()
    assert figures["predictions"]["all_tokens"]["cross_entropy_sparse"] == pytest.approx(by_hand, rel=1e-5)


def test_an_observer_of_what_runs_sees_each_layers_own_choice():
    model, ids = tiny_model("moba", layer_budgets=["full", "2x4"]), torch.randint(258, (2, 40))
    seen, meter = KeptMass(8), SparsityMeter(selection_of(model), beyond=8)
    for observer in (seen, meter):
        model(ids, use_cache=False, observer=observer)
    (first,), (second,) = seen.means()
    kept = meter.layers()[1].beyond_receptive_field.kept_mass
    assert first == 1 and second == pytest.approx(sum(kept) / 4, abs=1e-5) and second < 0.99


def test_the_uniform_budget_has_the_same_mean():
    ladder = Ladder(4, [1, 2, 3, 4, 6, 8], 10, [])
    config = tiny_config(num_hidden_layers=4)
    assert [str(r) for r in uniform_budgets(config, ladder, LayerBudgets.parse(["1x4", "8x4", "2x4", "3x4"]))] == [
        "3x4",
        "4x4",
        "3x4",
        "4x4",
    ]
    assert set(uniform_budgets(config, ladder, LayerBudgets.parse(["full"] * 4))) == {FULL}
    whole = uniform_budgets(config, ladder, LayerBudgets.parse(["full", "2x4", "2x4", "2x4"]))
    assert set(whole) == {Budget(4, 4)}
    released = tiny_config(num_hidden_layers=4, selection_rule="released", num_selected_blocks=2)
    assert set(uniform_budgets(released, ladder, LayerBudgets.parse(["1x4", "4x4", "2x4", "2x4"]))) == {Budget(4, 4)}


def test_steps_begin_with_the_least():
    assert ladder_steps([*range(1, 30)]) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    assert ladder_steps([*range(19, 70)]) == [19, 20, 24, 28, 32, 40, 48, 56, 64] and ladder_steps([]) == []


def test_a_target_of_everything_reads_everything(make_run, text):
    figures, said = tuned(make_run("full"), text, target=1.0)
    assert figures["layer_budgets"] == ["full"] * 3 and figures["compared"]["tuned"]["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert "Layers 0, 1, 2 keep 1 only where they read everything" in said and "reads sparsely" in said
    assert figures["compared"]["tuned"]["kept_mass"] == 1


def test_another_block_size_and_a_text_too_short_to_leave_anything_out(make_run, text):
    figures, said = tuned(make_run(), text, block_size=8)
    assert all(budget == "full" or budget.endswith("x8") for budget in figures["layer_budgets"])
    figures, said = tuned(make_run(), text, context=10, max_tokens=40, overwrite=True)
    assert figures["beyond"] == 0 and "over all queries" in said


def test_needles_are_looked_for_at_both_budgets(make_run, text):
    figures, said = tuned(make_run(max_position_embeddings=512), text, needle_lengths=(400,))
    assert all(0 <= side["needles_found"] <= 1 for side in figures["compared"].values())
    assert "needles found" in said and "less than half" in said


def test_on_the_command_line(make_run, text, tmp_path, capsys):
    run, out = make_run(), tmp_path / "out"
    words = ["tune-budget", str(run), "--data", str(text), "--context", "80", "--max-tokens", "240", "--device", "cpu"]
    assert main([*words, "--target-kept-mass", "0.9", "--out", str(out)]) == 0
    assert "KL from full" in capsys.readouterr().out and read_config(out).layer_budgets
    for more, told in (
        (["--target-kept-mass", "1.2"], "--target-kept-mass 1.2 must lie in 0..1"),
        (["--out", str(out)], "exists"),
        (["--out", str(run)], "is or holds the source"),
        (["--block-size", "0", "--out", str(text / "x")], "cannot be written"),
        (["--out", str(tmp_path / "more"), "--context", "999999999"], "exceed the model's"),
    ):
        assert main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    assert main(["tune-budget", str(run)]) == 2 and "pass --data" in capsys.readouterr().err
    assert not (tmp_path / "more").exists() and not run.with_name("model-tuned").exists()


def test_a_block_size_that_the_selector_does_not_have(make_run, text):
    with pytest.raises(UserError, match="mean_stride = 2 must divide"):
        tuned(make_run(**WINDOWS), text, block_size=5)


def test_two_ranks_find_what_one_finds(make_run, text, tmp_path, run_on_two_ranks):
    run = make_run()
    alone, _ = tuned(run, text, out=tmp_path / "alone")
    words = [
        "tune-budget",
        run,
        "--data",
        text,
        "--target-kept-mass",
        "0.9",
        "--context",
        "80",
        "--max-tokens",
        "240",
        "--device",
        "cpu",
    ]
    (said, _), (silent, _) = run_on_two_ranks("-m", "ssa", *words, "--out", tmp_path / "both")
    both = json.loads((tmp_path / "both" / "tune_budget.json").read_text())
    assert "perplexity" in said and not silent.strip()
    assert both["layer_budgets"] == alone["layer_budgets"] == read_config(tmp_path / "both").layer_budgets
    for ours, theirs in zip(alone["ladder"]["kept_mass"], both["ladder"]["kept_mass"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    for name in ("tuned", "uniform"):
        for key in ("perplexity", "kept_mass", "kl_nats"):
            assert both["compared"][name][key] == pytest.approx(alone["compared"][name][key], rel=1e-5)
