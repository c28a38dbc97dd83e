"""What a selection refuses when it is made."""

import pytest

from ssa.budget import Selection
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
