"""What a selection refuses when it is made; budgets for each layer and their names."""

import math

import pytest

from ssa.budget import FULL, Budget, LayerBudgets, Selection, parse_reading, tokens_of
from ssa.errors import UserError


@pytest.mark.parametrize(
    ("count", "block_size", "options", "words"),
    [
        (0, 4, {}, "num_selected_blocks = 0"),
        (2, 0, {}, "block_size = 0"),
        (2, 4, {"scope": "row"}, "scope = 'row' is not one of group, head"),
        (2, 4, {"scoring": "x"}, "scoring = 'x'"),
        (2, 4, {"rule": "half"}, "rule = 'half'"),
        (12, 16, {"rule": "released"}, "power of two"),
        (32, 16, {"rule": "released"}, "power of two"),
        (8, 4, {"rule": "released"}, "power of two"),
    ],
)
def test_what_cannot_be_selected_is_one_line(count, block_size, options, words):
    with pytest.raises(UserError, match=words) as error:
        Selection(count, block_size, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("readings", "name", "tokens"),
    [
        (["1x16", "2x16"], "tuned-1.5x16", 24),
        (["2x16", "4x16", "2x16"], "tuned-2.7x16", 43.2),
        (["4x16", "4x16"], "tuned-4x16", 64),
        (["4x16", "full", "2x16"], "tuned-3x16+1full", math.inf),
        (["4x16", "1x8"], "tuned-36", 36),
        (["full", "full"], "tuned-2full", math.inf),
    ],
)
def test_budgets_for_each_layer_have_a_name_that_tells_their_mean(readings, name, tokens):
    budgets = LayerBudgets.parse(readings)
    assert str(budgets) == name and [str(reading) for reading in budgets] == readings and len(budgets) == len(readings)
    assert tokens_of(name) == pytest.approx(tokens) and budgets.tokens == pytest.approx(tokens, rel=0.02)
    assert parse_reading(budgets) is budgets


def test_names_of_other_readings_tell_their_tokens_and_foreign_ones_are_refused():
    assert tokens_of("4x16") == Budget(4, 16).tokens and tokens_of("full") == FULL.tokens == math.inf
    for name in ("tuned", "tuned-", "tuned-x16", "own"):
        with pytest.raises(UserError, match="is not BLOCKSxSIZE"):
            tokens_of(name)
    with pytest.raises(UserError, match="name no layer"):
        LayerBudgets.parse([])
