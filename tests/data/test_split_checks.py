import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssa.data.encode import valid_threshold
from ssa.data.split_checks import LEAST_DOCUMENTS, LEAST_TOKENS, LowestHashes

DOCUMENTS = st.lists(st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 40), st.integers(2, 9000)), max_size=60)


@given(DOCUMENTS, st.integers(1, 9))
def test_the_fraction_is_the_smallest_that_is_enough(documents, size):
    lowest = LowestHashes()
    for start in range(0, len(documents), size):  # in any parts, continued in another process
        some = documents[start : start + size]
        lowest.add(np.array([h for h, _ in some], np.uint64), np.array([n for _, n in some], np.int64))
        lowest = LowestHashes(lowest.state())
    fraction = lowest.fraction()

    def apart(below):
        chosen = [tokens for value, tokens in documents if value < below]
        return len(chosen) >= LEAST_DOCUMENTS and sum(chosen) >= LEAST_TOKENS

    if fraction is None:
        assert not apart(2**63 // 2)  # rounding up may lead beyond a half
    else:
        assert fraction <= 0.5 and apart(valid_threshold(fraction)) and not apart(valid_threshold(fraction * 0.89))


def test_the_state_stays_small():
    rng, lowest = np.random.default_rng(0), LowestHashes()
    for _ in range(50):
        lowest.add(rng.integers(0, 2**64, 1000, np.uint64), np.full(1000, 500))
    assert len(lowest.state()) == 100
