"""The lists of readers that the key side walks, against their definition."""

import os

import pytest
import torch

from ssa.budget import Selection
from ssa.ops import select_blocks
from ssa.testing import document_positions, random_qkv

pytest.importorskip("triton")
device = os.environ.get("SSA_TEST_DEVICE", "cpu")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not device.startswith("cuda"), reason="with a GPU at hand the kernels are tested there"
)

MANY = "more lists than a program takes"
ODD = "documents, spans of odd length"  # words of the map would be of two spans
# B, T, S, heads that select, kv heads, block size, k, queries and rows of a span, segment, positions
CASES = {
    "plain": (2, 50, 60, 2, 2, 8, 4, (50, 4), 16, None),
    "spans": (1, 64, 64, 2, 2, 8, 4, (16, 2), 8, None),
    "spans of single rows": (2, 40, 40, 2, 2, 8, 4, (16, 1), 8, None),
    "spans of two rows": (2, 40, 44, 2, 2, 8, 4, (40, 2), 8, None),
    "one long list": (1, 70, 70, 1, 1, 70, 1, (70, 1), 4, None),
    "documents": (1, 40, 40, 1, 1, 8, 3, (16, 1), 8, document_positions([17, 1, 22])),
    ODD: (1, 40, 40, 1, 1, 8, 3, (13, 1), 8, document_positions([17, 1, 22])),
    "heads that share keys": (2, 36, 36, 6, 2, 8, 3, (20, 2), 8, None),
    MANY: (1, 300, 300, 1, 1, 1, 2, (300, 1), 4, None),
}
WAYS = ("by a map", "by sorting")


@pytest.mark.parametrize(("case", "way"), [(case, way) for case in CASES for way in WAYS if (case, way) != (MANY, WAYS[0])])
def test_every_pair_is_in_the_list_of_its_block(case, way, monkeypatch):
    from ssa.ops.triton import reader_lists as module

    if way == "by sorting":
        monkeypatch.setattr(module, "MAP_BYTES", 0)
    batch, queries, keys, heads, kv_heads, block_size, count, span, segment, positions = CASES[case]
    q, k, _ = random_qkv(batch, queries, keys, heads, kv_heads, 16, dtype=torch.float32)
    index, _ = select_blocks(q, k, Selection(count, block_size, scope="head"), positions=positions, impl="reference")
    on_device = None if positions is None else positions.contiguous().to(device)
    launched = set()

    def launch(plan, kernel, *args, run=module.launch, **options):
        launched.add(kernel)
        run(plan, kernel, *args, **options)

    monkeypatch.setattr(module, "launch", launch)
    lists = module.reader_lists(None, index.to(device), on_device, keys, block_size, span, segment, kv_heads)
    mapped = way == "by a map" and case != ODD
    assert launched == {module._name_kernel, module._gather_kernel if mapped else module._list_kernel}
    table, counts, items = lists.table.cpu(), lists.counts.cpu(), lists.item_list.cpu()
    order = lists.pair_order.cpu()

    expected = [[] for _ in range(lists.spans * lists.num_blocks)]
    for pair, block in enumerate(index.flatten().tolist()):
        t, row = pair // count % queries, pair // count // queries
        start = 0 if positions is None else keys - queries + t - int(positions[row // heads, t])
        if block >= 0:
            name = (start + block * block_size) // lists.unit
            length, rows = span
            kv_row = row // (heads // kv_heads)
            of_span = t // length * (batch * kv_heads // rows) + kv_row // rows
            expected[of_span * lists.num_blocks + kv_row % rows * lists.row_blocks + name].append(pair)
    found = [order[table[i, 0] : table[i, 1]].tolist() for i in range(len(expected))]
    assert found == expected  # in the order of the heads and queries, too

    for s in range(lists.spans):
        of_span = list(range(s * lists.num_blocks, (s + 1) * lists.num_blocks))
        segments = {i: -(-len(expected[i]) // segment) for i in of_span}
        taken = [(item % 2**32, item >> 32) for item in items[s, : counts[s] % 2**32].tolist()]
        assert sorted(taken) == [(i, part) for i in of_span for part in range(segments[i])]
        parts = sorted((int(table[i, 2]), n) for i, n in segments.items() if n > 1)
        assert [begin for begin, _ in parts] == [sum(n for _, n in parts[:j]) for j in range(len(parts))]
        assert sum(n for _, n in parts) == counts[s] >> 32 <= lists.span_parts and counts[s] % 2**32 <= lists.span_items
