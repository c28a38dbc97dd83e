"""Blocks that lie elsewhere: pages of a pool that all rows share give what contiguous rows give, by the reference and by the Triton kernels
(on the CPU by Triton's interpreter, or on the GPU named by SSA_TEST_DEVICE)."""

import importlib.util

import pytest
import torch

from marks import needs_triton, on_gpu
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.ops import block_sparse_attention, select_blocks
from ssa.testing import document_positions, poisoned_empty, random_qkv

IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]
NAN = float("nan")


class Pages:
    """Keys, values and biases of rows of `lengths` tokens as leaves, laid out in two ways: in rows that end together, and in the pages of one
    pool, shuffled, another order for every row and kv head, with NaN in whatever no token fills."""

    def __init__(self, lengths, kv_heads, size, block_size, dtype):
        generator = torch.Generator("cpu").manual_seed(sum(lengths))
        self.lengths, self.kv_heads, self.block_size = lengths, kv_heads, block_size
        self.leaves = [
            torch.randn(sum(lengths), kv_heads, *more, generator=generator, device="cpu", dtype=torch.float64)
            .to(torch.get_default_device(), dtype)
            .requires_grad_()
            for more in ((size,), (size,), ())
        ]
        blocks = [-(-n // block_size) for n in lengths]
        self.table = torch.zeros(len(lengths), kv_heads, max(blocks), dtype=torch.int32)
        places = torch.stack([torch.randperm(sum(blocks) + 3, generator=generator, device="cpu") for _ in range(kv_heads)])
        for b, n in enumerate(blocks):
            self.table[b, :, :n] = places[:, sum(blocks[:b]) : sum(blocks[: b + 1])].to(self.table)
        self.columns = places.shape[1] * block_size

    def rows(self):
        """k, v [B, S, K, D] and bias [B, S, K]."""
        longest = max(self.lengths)
        pieces = [x.split(self.lengths) for x in self.leaves]
        return [torch.stack([torch.cat([p.new_zeros(longest - len(p), *p.shape[1:]), p]) for p in piece]) for piece in pieces]

    def pool(self):
        token = torch.cat([torch.arange(n) for n in self.lengths])
        row = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        heads = torch.arange(self.kv_heads)
        page = self.table[row[:, None], heads, token[:, None] // self.block_size].long()
        column = page * self.block_size + token[:, None] % self.block_size
        pools = [x.new_full((self.columns, *x.shape[1:]), NAN).index_put((column, heads), x) for x in self.leaves]
        return [x.expand(len(self.lengths), *x.shape) for x in pools]

    def slots(self, index):
        table = self.table.repeat_interleave(index.shape[1] // self.kv_heads, 1)
        slots = table.gather(2, index.clamp(min=0).long().flatten(2)).view(index.shape)
        return slots.masked_fill(index < 0, -1)


# lengths, T, H, K, D, block size, k, scope
CASES = {
    "ragged, incomplete last blocks": ([61, 34, 7], 5, 4, 2, 16, 8, 3, "group"),
    "a query whose row has not begun": ([40, 3], 6, 6, 2, 24, 4, 4, "group"),
    "heads choose": ([50, 33], 3, 4, 2, 16, 4, 3, "head"),
    "steps within a block": ([90, 47], 4, 8, 1, 16, 32, 2, "group"),
    "one key a block, more places than blocks": ([9, 4], 2, 2, 2, 16, 1, 12, "group"),
}


def case(name, dtype):
    lengths, queries, heads, kv_heads, size, block_size, count, scope = CASES[name]
    pages = Pages(lengths, kv_heads, size, block_size, dtype)
    q = torch.randn(len(lengths), queries, heads, size, dtype=torch.float64).to(dtype).requires_grad_()
    first = torch.tensor(lengths)[:, None] - queries
    before = first + torch.arange(queries) < 0
    positions = (first + torch.arange(queries)).clamp(min=0)
    index, _ = select_blocks(q, pages.rows()[0], Selection(count, block_size, scope=scope), positions=positions, impl="reference")
    return pages, q, positions, index.masked_fill(before[:, None, :, None], -1), block_size


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_pages_equal_rows_with_gradients(name, biased):
    pages, q, positions, index, block_size = case(name, torch.float64)
    leaves = [q, *pages.leaves[: 3 if biased else 2]]
    results = []
    for (k, v, bias), slots in ((pages.rows(), None), (pages.pool(), pages.slots(index))):
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            index,
            block_size=block_size,
            positions=positions,
            bias=bias if biased else None,
            slots=slots,
            impl="reference",
        )
        seen = torch.isfinite(lse)
        results.append([out, lse, *torch.autograd.grad(out.sin().sum() + lse[seen].cos().sum(), leaves)])
    for paged, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(paged, plain, rtol=1e-12, atol=1e-12)


def by_kernels(pages, q, positions, index, block_size, slots, biased):
    k, v, bias = pages.pool()
    with torch.no_grad(), poisoned_empty():
        return block_sparse_attention(
            q, k, v, index, block_size=block_size, positions=positions, bias=bias if biased else None, slots=slots, impl="triton"
        )


@needs_triton
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_read_pages(name, biased):
    pages, q, positions, index, block_size = case(name, torch.float32)
    k, v, bias = pages.rows()
    options = {"block_size": block_size, "positions": positions, "bias": bias if biased else None}
    with torch.no_grad():
        rows = block_sparse_attention(q, k, v, index, impl="triton", **options)
        reference = block_sparse_attention(q, k, v, index, impl="reference", **options)
    paged = by_kernels(pages, q, positions, index, block_size, pages.slots(index), biased)
    for a, b, c in zip(paged, rows, reference, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_slot_beside_the_right_one_is_seen(impl):
    pages, q, positions, index, block_size = case("heads choose", torch.float32)
    wrong = (pages.slots(index) + 1) % (pages.columns // block_size)
    k, v, _ = pages.rows()
    plain, _ = block_sparse_attention(q, k, v, index, block_size=block_size, positions=positions, impl="reference")
    k, v, _ = (x.nan_to_num(1.0) for x in pages.pool())
    for slots, same in ((pages.slots(index), True), (wrong, False)):
        with torch.no_grad():
            paged, _ = block_sparse_attention(q, k, v, index, block_size=block_size, positions=positions, slots=slots, impl=impl)
        assert torch.allclose(paged, plain, rtol=1e-4, atol=1e-5) == same


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("scope", ["group", "head"])
def test_blocks_at_their_own_numbers_change_nothing(impl, scope, biased):
    q, k, v = random_qkv(2, 7, 45, 4, 2, 16, dtype=torch.float32)
    bias = torch.randn(2, 45, 2, requires_grad=True) if biased else None
    leaves = [q, k, v, *([bias] if biased else [])]
    index, _ = select_blocks(q, k, Selection(4, 8, scope=scope), impl="reference")
    index[1, :, 2, 1:] = -1
    positions = torch.arange(38, 45).expand(2, 7)
    results = []
    for slots in (None, index):
        with torch.set_grad_enabled(impl == "reference"):
            results.append(
                [*block_sparse_attention(q, k, v, index, block_size=8, positions=positions, bias=bias, slots=slots, impl=impl)]
            )
        if impl == "reference":
            results[-1] += torch.autograd.grad(results[-1][0].sin().sum() + results[-1][1].sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_more_queries_than_columns_in_chunks_and_in_a_graph(monkeypatch, biased):
    """Of a document of 40 tokens two blocks are at hand."""
    from ssa.ops.reference import block_sparse as reference

    q, k, v = random_qkv(1, 40, 40, 2, 1, 8)
    bias = torch.randn(1, 40, 1, dtype=torch.float64) if biased else None
    index = torch.tensor([1, 3], dtype=torch.int32).expand(1, 1, 40, 2).contiguous()
    index[..., 1].masked_fill_(torch.arange(40) < 24, -1)
    index[..., 0].masked_fill_(torch.arange(40) < 8, -1)
    positions = document_positions([40])
    at_hand = [x if x is None else torch.cat([x[:, 24:32], x[:, 8:16]], 1) for x in (k, v, bias)]
    slots = torch.where(index < 0, -1, 1 - index // 2).to(torch.int32)

    def attend(q, k, v, bias):
        return block_sparse_attention(q, k, v, index, block_size=8, positions=positions, bias=bias, slots=slots)

    plain = block_sparse_attention(q, k, v, index, block_size=8, bias=bias)
    monkeypatch.setattr(reference, "LOGIT_ELEMENTS", 2 * 2 * 8 * 7)  # 7 queries
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for run in (attend, compiled):
        found = run(q, *at_hand)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(x.square().sum(), (q, k, v), retain_graph=True) for x in (found[0], plain[0])]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_one_line():
    q, k, v = random_qkv(1, 4, 32, 2, 1, 16, dtype=torch.float32)
    index, _ = select_blocks(q, k, Selection(2, 8), impl="reference")
    positions = torch.arange(28, 32)[None]
    fits = {"block_size": 8, "positions": positions, "slots": index, "impl": "reference"}
    wrong = [
        ({"slots": index.long()}, "slots"),
        ({"slots": index[..., :1]}, "slots"),
        ({"positions": None}, "slots need positions"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "slots need positions"),
        ({"positions": positions[:, :3]}, "positions"),
        ({"block_size": 33}, "whole blocks"),
    ]
    if not on_gpu:  # there nobody looks at them, which would stall every layer
        wrong += [({"slots": index + 1}, "slots leave k"), ({"slots": index - 4}, "slots leave k")]
    if importlib.util.find_spec("triton") is not None and not on_gpu:
        wrong.append(({"impl": "triton"}, "no gradient through slots"))
    block_sparse_attention(q, k, v, index, **fits)
    for change, words in wrong:
        with pytest.raises(UserError, match=words) as error:
            block_sparse_attention(q, k, v, index, **(fits | change))
        assert "\n" not in str(error.value)


@needs_triton
def test_the_operators_are_good_citizens_of_pytorch():
    from ssa.ops.reference.block_sparse import block_sparse_op
    from ssa.ops.triton.block_sparse import block_sparse_forward

    q, k, v = random_qkv(1, 6, 16, 2, 1, 16, dtype=torch.float32)
    index, _ = select_blocks(q, k, Selection(2, 4), impl="reference")
    positions = torch.arange(10, 16)[None]
    for operator in (block_sparse_op, block_sparse_forward):
        inputs = [x.detach() if operator is block_sparse_forward else x for x in (q, k, v)]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, (*inputs, index, positions, torch.zeros(1, 16, 1), index, 4, 0.25), test_utils=checks)
