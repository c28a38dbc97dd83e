import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssa.data.packing import positions_from_document_ends


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_positions_equal_counting_one_by_one(lengths, data):
    ends = np.cumsum(lengths)
    start = data.draw(st.integers(0, int(ends[-1]) - 1))
    stop = data.draw(st.integers(start, int(ends[-1])))
    expected, position = [], 0
    for offset in range(start, stop):
        position = 0 if offset == start or offset in ends else position + 1
        expected.append(position)
    assert positions_from_document_ends(ends - start, stop - start).tolist() == expected


def test_documents_of_one_token_are_all_zero():
    positions = positions_from_document_ends(np.arange(1, 8), 7)
    assert positions.dtype == np.int64
    assert positions.tolist() == [0] * 7
