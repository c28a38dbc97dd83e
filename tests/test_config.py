import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.budget import FULL, Budget, parse_reading, parse_readings
from ssa.config import Recipe, find_recipe, load_recipe, override, read_recipe
from ssa.errors import UserError

PRESETS = ("tiny", "33m", "60m", "300m", "1b", "servable-1b")


def one_line(error):
    return "\n" not in str(error) and len(str(error)) > 5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_state_their_size(name):
    from ssa.model import SSAForCausalLM
    from ssa.model.configuration import SSAConfig

    recipe = load_recipe(name)
    with torch.device("meta"):
        model = SSAForCausalLM(SSAConfig.from_recipe(recipe.model, recipe.model.vocab_size or 258))
    heading = find_recipe(name).read_text().splitlines()[0]
    assert heading.startswith(f"# {name}: ") and f"Parameters: {model.num_parameters():,}." in heading


def test_every_preset_is_known_here():
    """`adapt` has no shape of its own."""
    assert {path.stem for path in find_recipe("tiny").parent.glob("*.toml")} == {*PRESETS, "adapt"}
    assert load_recipe("adapt").train.probe_every == 100


def test_presets_follow_table_a1():
    for name, shape in {"300m": (1024, 4096, 16, 1), "1b": (2048, 8192, 32, 2)}.items():
        m = load_recipe(name).model
        assert (m.hidden_size, m.intermediate_size, m.num_attention_heads, m.num_key_value_heads) == shape
        assert (m.num_hidden_layers, m.head_dim, m.vocab_size, m.tie_word_embeddings) == (16, 64, 128256, True)
        assert (m.rope_theta, m.rope_factor, m.rope_original_max_position, m.max_position_embeddings) == (5e5, 4.0, 8192, 131072)
        assert (m.block_size, m.num_selected_blocks, m.full_ratio, m.alignment_weight) == (16, 16, 0.5, 10.0)
    t, d = load_recipe("1b").train, load_recipe("1b").data
    assert t.batch_size * t.accumulation * d.context == 3145728 and d.context == 8192
    assert (t.betas, t.weight_decay, t.clip, t.lr, t.min_lr, t.warmup) == ((0.9, 0.95), 0.1, 1.0, 1e-3, 0.0, 0.01)
    assert t.steps * 3145728 == pytest.approx(100e9, rel=1e-3)
    servable = load_recipe("servable-1b").model
    assert (servable.block_size, servable.head_dim, servable.num_attention_heads, servable.num_key_value_heads) == (
        128,
        128,
        16,
        2,
    )


def test_budget():
    assert Budget.parse("4x16") == Budget(4, 16) and str(Budget(4, 16)) == "4x16" and Budget(4, 16).tokens == 64
    assert parse_readings("4x16, full,16X16") == [Budget(4, 16), FULL, Budget(16, 16)]
    for text in ("", ",", "4", "4x", "0x16", "4x0", "-4x16", "4x16x2", "fulll"):
        with pytest.raises(UserError):
            parse_readings(text)
    with pytest.raises(UserError, match="budget None"):
        parse_reading(None)


def test_json_round_trip():
    recipe = load_recipe("tiny", ["--train.betas", "0.5", "0.6", "--model.no-attention-gate"])
    assert read_recipe(recipe.to_json()) == recipe
    assert recipe.train.betas == (0.5, 0.6) and recipe.model.attention_gate is False


@pytest.mark.parametrize(
    "text, says",
    [
        ("[train]\nstep = 3", "unknown key 'train.step'; did you mean train.steps?"),
        ("[data]\nqqq = 3", "unknown key 'data.qqq'; known: path, tokenizer"),
        ("[trian]\nsteps = 3", "unknown table or key 'trian'; did you mean .train.?"),
        ("steps = 3", "unknown table or key 'steps'"),
        ("train = 3", r"\[train\] must be a table"),
        ("[train]\nsteps = 3.5", r"train.steps = 3.5 is not int"),
        ("[train]\nsteps = true", "train.steps = True is not int"),
        ("[train]\nsteps = 0", "train.steps = 0 must be at least 1"),
        ("[train]\nlr = nan", "train.lr = nan is not a finite number"),
        ("[train]\nlr = 1" + "0" * 400, "too large for a float"),
        ("[train]\nsteps = 1" + "0" * 5000, "cannot be read"),
        ("[train]\nbetas = [0.9]", "train.betas"),
        ("[train]\nwarmup = 1.5", r"train.warmup = 1.5 is a share of the steps, which lies in 0..1"),
        ("[train]\nalignment_warmup = -0.1", r"train.alignment_warmup = -0.1 is a share of the steps, which lies in 0..1"),
        ("[train]\nseed = 9223372036854775808", "train.seed"),
        ("[model]\nmethod = 'sas'", "model.method = 'sas' is not one of full, moba, nsa, ssa"),
        ("[model]\nnum_attention_heads = 4\nnum_key_value_heads = 3", "must be a multiple of model.num_key_value_heads"),
        ("[model]\nhead_dim = 31", "must be even"),
        ("[model]\nselection_rule = 'released'\nnum_selected_blocks = 3", "power of two"),
        ("[model]\nmethod = 'nsa'\nselection_scope = 'head'", "does not go with method nsa"),
        ("[data]\ncontext = 999999", "exceeds model.max_position_embeddings"),
        ("[train]\nmin_lr = 1.0", "exceeds train.lr"),
        ("{]", "cannot be read"),
        ("[" * 100000, "cannot be read"),
        ('{"train": [1]}', "must be a table"),
    ],
)
def test_bad_recipes_are_told_in_one_line(text, says):
    with pytest.raises(UserError, match=says) as caught:
        read_recipe(text, "some.toml")
    assert one_line(caught.value)


VALUES = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none()),
)
KEYS = {table: sorted(fields) for table, fields in Recipe().to_dict().items()}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_tables_end_in_a_recipe_or_one_line(data):
    tables = {
        table: data.draw(st.dictionaries(st.one_of(st.sampled_from(KEYS[table]), st.text(max_size=5)), VALUES, max_size=3))
        for table in KEYS
    }
    try:
        recipe = read_recipe(json.dumps(tables))
    except UserError as error:
        assert one_line(error)
    else:
        assert read_recipe(recipe.to_json()) == recipe


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="[]{}=\"'#.\n 0123456789truefalsmodelinpdxo-_:+")))
def test_any_text_ends_in_a_recipe_or_one_line(text):
    try:
        read_recipe(text)
    except UserError as error:
        assert one_line(error)


FIELDS = [f"--{table}.{name}" for table, names in KEYS.items() for name in names]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FIELDS), st.text(max_size=6).filter(lambda s: s not in ("-h", "--help"))), max_size=4))
def test_any_overrides_end_in_a_recipe_or_one_line(arguments):
    try:
        assert isinstance(override(Recipe(), arguments), Recipe)
    except UserError as error:
        assert one_line(error)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "\0", "a\0.toml", ""])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match=r"presets .*tiny"):
        find_recipe(name)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_name_finds_a_file_or_one_line(name):
    try:
        assert find_recipe(name).is_file()
    except UserError as error:
        assert one_line(error)


def test_override_errors_name_the_field_and_the_nearest():
    for arguments, says in (
        (["--train.stps", "3"], r"--train.stps; did you mean --train.steps\?"),
        (["--train.steps", "x"], "--train.steps.*'x'"),
        (["--train.steps", "0"], "^train.steps = 0 must be at least 1$"),
        (["--model.method", "sas"], "'sas' is not one of full, moba, nsa, ssa"),
        (["--train.steps"], "--train.steps"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            override(Recipe(), arguments)
        assert one_line(caught.value)


def test_unreadable_recipe_files(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"[train]\n# caf\xe9\n")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(str(tmp_path / "latin.toml"))
    with pytest.raises(UserError, match=r"presets .*tiny"):
        load_recipe("tinny")
