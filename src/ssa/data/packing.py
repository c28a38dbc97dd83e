"""Packing: rows cut from a stream of documents, with positions that restart at each document.

Positions alone tell the model where documents are: 0 starts one, and nothing reads or is predicted across it.
"""

from __future__ import annotations

import numpy as np


def positions_from_document_ends(ends: np.ndarray, length: int) -> np.ndarray:
    """int64 [length]: 0 at the row's first token and wherever a document starts, counting up in between.

    ``ends``: ascending offsets relative to the row, each the end of one document and so the start of the next; those at or below 0 and
    at or above ``length`` say nothing. A row that starts in the middle of a document starts at 0: what came before cannot be read.
    """
    starts = np.zeros(length, np.int64)
    inner = ends[(ends > 0) & (ends < length)]
    starts[inner] = inner
    return np.arange(length, dtype=np.int64) - np.maximum.accumulate(starts)
