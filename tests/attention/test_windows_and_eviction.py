"""The selectors windows (InfLLM-V2) and eviction (NOSA): in models, in training, in a cache; and the faults of the authors' code, each a test
with its number in their order of `test_fault_...` (those of the operations alone stand with these)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.attention import AttentionCall, AttentionInputs, HeadShape
from ssa.attention.selectors.eviction import EvictionSelector
from ssa.attention.selectors.windows import WindowsSelector
from ssa.budget import Selection
from ssa.config import ModelRecipe, Recipe, TrainRecipe
from ssa.errors import UserError
from ssa.methods import full_name, split_name
from ssa.model import BlockCache, SSAForCausalLM
from ssa.ops import block_sparse_attention, dense_attention
from ssa.testing import attend, attention_oracle, check_selector, random_qkv, tiny_config, tiny_model
from ssa.train.optim import build_optimizer, parameter_groups

TINY = {"mean_size": 4, "mean_stride": 2, "sink_blocks": 1, "local_blocks": 1}
NOSA = TINY | {"query_blocks": 1}
CHUNKS = (1, 17, 64, 1000)


def nosa_model(method="moba", budget="5x4", seed=0, moved=True, **options):
    """A tiny model over the selector eviction, its weights as training may leave them where `moved`."""
    blocks, size = map(int, budget.split("x"))
    model = tiny_model(
        method, seed, selector="eviction", selector_options=NOSA | options, num_selected_blocks=blocks, block_size=size
    )
    return with_moved_weights(model) if moved else model


@torch.no_grad()
def with_moved_weights(module):
    for name, p in module.named_parameters():
        if name.endswith(("A", "delta.weight", "delta.bias")):
            p += torch.randn(p.shape, generator=torch.Generator("cpu").manual_seed(len(name)), device="cpu").to(p)
    return module


def a_selector(heads=4, kv_heads=2, size=8, dtype=torch.float32, **options):
    selector = EvictionSelector(HeadShape(heads, kv_heads, size), **(NOSA | {"lse": "exact", "dense_length": 0} | options))
    return with_moved_weights(selector).to(dtype)


def tokens(rows=2, length=70, seed=5):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(
        torch.get_default_device()
    )


@pytest.mark.parametrize(
    ("selector", "options", "fields"),
    [
        ("windows", TINY, {}),
        ("windows", TINY | {"lse": "coarse"}, {"method": "moba"}),
        ("windows", TINY | {"mean_size": 4, "mean_stride": 4, "sink_blocks": 0}, {"method": "moba", "selection_scope": "head"}),
        ("eviction", NOSA, {"budget": "5x4"}),
        ("eviction", NOSA | {"query_blocks": 2, "delta_bias": True}, {"budget": "6x4", "method": "moba"}),
        ("eviction", NOSA | {"dense_length": 30}, {"budget": "5x4", "method": "moba"}),
        ("eviction", NOSA | {"query_blocks": 0}, {"num_attention_heads": 6, "hidden_size": 48, "method": "moba"}),
        (
            "eviction",
            NOSA | {"lse": "coarse"},
            {"budget": "5x4", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48},
        ),
    ],
    ids=str,
)
def test_they_do_what_a_selector_must(on_the_cpu, selector, options, fields):
    check_selector(selector, options, **({"budget": "4x4"} | fields))


def test_names():
    assert split_name("infllmv2") == ("moba", "windows") and split_name("nosa") == ("moba", "eviction")
    model = tiny_model("nosa", selector_options=NOSA, num_selected_blocks=5)
    assert full_name(model.config.method, model.config.selector) == "moba+eviction"
    names = {name.rpartition("selector.")[2] for name, _ in model.named_parameters() if "selector" in name}
    assert names == {"A", "delta.weight"}, "NOSA's names"
    layer = model.model.layers[0].self_attn.selector
    assert layer.A.shape == (2,) and layer.delta.weight.shape == (2, 16)
    assert not dict(
        tiny_model("infllmv2", selector_options=TINY, num_selected_blocks=5).model.layers[0].self_attn.selector.state_dict()
    )


# --- the start, and what trains


def test_the_start_keeps_the_function_and_has_a_gradient():
    """A = 1, delta = 0: the same bias for every key."""
    plain, x = tiny_model("moba"), tokens()
    model = nosa_model(moved=False)
    left = model.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys and all("selector" in name for name in left.missing_keys)
    full = dict(attention_mode="full", use_cache=False)
    torch.testing.assert_close(model(x, **full).logits, plain(x, **full).logits, rtol=1e-5, atol=1e-5)
    for mode in ("sparse", "full"):
        model.zero_grad()
        model(x, labels=x, attention_mode=mode, use_cache=False).loss.backward()
        for layer in model.model.layers:
            selector = layer.self_attn.selector
            assert (selector.A == 1).all() and (selector.delta.weight == 0).all()
            assert selector.delta.weight.grad.abs().max() > 1e-6, "A = 0 would leave delta without one"


def test_any_equal_bias_changes_nothing_in_either_stream():
    q, k, v = random_qkv(1, 60, 60, 4, 2, 8)
    selector = EvictionSelector(HeadShape(4, 2, 8), **NOSA).double()
    bias = selector.key_bias(k, v).detach()
    torch.testing.assert_close(bias, torch.full_like(bias, 2.0).log())
    for mode in ("sparse", "full"):
        call = AttentionCall(mode, Selection(5, 4))
        with_bias = attend("moba", q, k, v, None, call, selector, bias)
        without, _, _ = attention_oracle(q, k, v, with_bias.block_indices, block_size=4)
        torch.testing.assert_close(with_bias.out_BTHD, without)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gradients_of_the_head(sparse):
    q, k, v = (x.detach() for x in random_qkv(1, 22, 22, 2, 2, 3))
    selector = a_selector(2, 2, 3, torch.float64, delta_bias=True)
    A, weight, offset = (p.detach().clone().requires_grad_() for p in (selector.A, selector.delta.weight, selector.delta.bias))
    v.requires_grad_()
    index = selector.select(AttentionInputs(q, k, v, bias_BSK=selector.key_bias(k, v)), AttentionCall("sparse", Selection(5, 4)))

    def attended(A, weight, offset, v):
        parameters = {"A": A, "delta.weight": weight, "delta.bias": offset}
        bias = torch.func.functional_call(_Bias(selector), {f"selector.{n}": p for n, p in parameters.items()}, (k, v))
        if sparse:
            return block_sparse_attention(q, k, v, index, block_size=4, bias=bias)[0]
        return dense_attention(q, k, v, bias=bias)

    assert torch.autograd.gradcheck(attended, (A, weight, offset, v))


class _Bias(torch.nn.Module):
    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, k, v):
        return self.selector.key_bias(k, v)


@pytest.mark.parametrize("size", [1, 4])
def test_the_bias_is_the_formula(size):
    _, k, v = random_qkv(2, 5, 5, 6, 3, size)
    selector = a_selector(6, 3, size, torch.float64, delta_bias=True)
    bias = selector.key_bias(k, v)
    for b in range(2):
        for t in range(5):
            scores = selector.delta.weight @ v[b, t].reshape(-1) + selector.delta.bias  # all kv heads' values together
            torch.testing.assert_close(bias[b, t], selector.A * scores.exp().log1p())


@pytest.mark.parametrize("positions", [None, torch.cat([torch.arange(n) for n in (33, 1, 26)])[None]], ids=["plain", "packed"])
def test_everything_selected_is_dense_attention_with_the_bias(positions):
    q, k, v = random_qkv(1, 60, 60, 4, 2, 8)
    selector, results = a_selector(dtype=torch.float64), []
    for mode in ("sparse", "full"):
        bias = selector.key_bias(k, v)
        out = attend(
            "moba", q, k, v, None, AttentionCall(mode, Selection(15, 4), positions_BT=positions), selector, bias
        ).out_BTHD
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, *selector.parameters()))])
    oracle, _, _ = attention_oracle(q, k, v, positions=positions, bias=selector.key_bias(k, v))
    torch.testing.assert_close(results[0][0], oracle)
    for sparse, full in zip(*results, strict=True):
        torch.testing.assert_close(sparse, full)
        assert full.abs().max() > 1e-6
    unbiased, _, _ = attention_oracle(q, k, v, positions=positions)
    assert (unbiased - oracle).abs().max() > 1e-2, "the bias is large enough to be missed"


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**16), by_query=st.integers(0, 4), more=st.integers(1, 5), group=st.sampled_from([1, 2, 3]))
def test_locality_theorem(seed, by_query, more, group):
    """From one query to the next inside a block at least 1 - query_blocks / k of the blocks stay."""
    selector = a_selector(2 * group, 2, 4, torch.float64, query_blocks=by_query)
    q, k, v = (x.detach() for x in random_qkv(1, 90, 90, 2 * group, 2, 4, seed=seed))
    count = 3 + by_query + more
    index = selector.select(
        AttentionInputs(5 * q, k, v, bias_BSK=selector.key_bias(k, v)), AttentionCall("sparse", Selection(count, 4))
    )
    full = (index >= 0).all(-1)  # queries that have a choice
    stays = (index[:, :, 1:, :, None] == index[:, :, :-1, None, :]).any(-1).sum(-1)
    inside = full[:, :, 1:] & full[:, :, :-1] & (torch.arange(1, 90) % 4 != 0)
    assert inside.any() and (stays[inside] >= count - by_query).all()


def test_without_importance_less_stays():
    """What the theorem is about: by query alone, more than that share of the blocks changes."""
    q, k, v = (x.detach() for x in random_qkv(1, 120, 120, 2, 2, 8))
    lost = []
    for selector in (a_selector(2, 2, 8, torch.float64), WindowsSelector(HeadShape(2, 2, 8), **TINY)):
        bias = selector.key_bias(k, v)
        index = selector.select(AttentionInputs(5 * q, k, v, bias_BSK=bias), AttentionCall("sparse", Selection(8, 4)))
        stays = (index[:, :, 61:64, :, None] == index[:, :, 60:63, None, :]).any(-1).sum(-1)
        lost.append((8 - stays).max().item())
    assert lost[0] <= 1 < lost[1]


# --- precision, saving, optimizers


def test_weights_stay_fp32_in_a_model_of_half_precision(tmp_path):
    model, x = nosa_model(), tokens()
    model.to(torch.bfloat16)
    assert model.model.layers[0].self_attn.selector.A.dtype == torch.bfloat16, "what `to` is told it does"
    model = nosa_model()
    model.save_pretrained(tmp_path)
    again = SSAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).to(x.device)
    assert again.lm_head.weight.dtype == torch.bfloat16
    for one, other in zip(model.model.layers, again.model.layers, strict=True):
        for name, p in other.self_attn.selector.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, one.self_attn.selector.get_parameter(name)), name
    seen = []
    again(x, observer=lambda layer, record: seen.append(record.bias_BSK), use_cache=False)
    assert all(bias.dtype == torch.float32 for bias in seen)
    again.save_pretrained(tmp_path / "again")
    saved = SSAForCausalLM.from_pretrained(tmp_path / "again").to(x.device)
    assert torch.equal(
        saved.model.layers[0].self_attn.selector.delta.weight, model.model.layers[0].self_attn.selector.delta.weight
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_does_not_change_the_bias(dtype):
    _, k, v = (x.detach().to(dtype) for x in random_qkv(2, 30, 30, 4, 2, 8))
    selector = a_selector()
    expected = selector.key_bias(k, v)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(selector.key_bias(k, v), expected)
    exact = a_selector(dtype=torch.float64).key_bias(k.double(), v.double())
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-6)


def test_no_optimizer_decays_the_head_and_muon_leaves_it_alone():
    model = nosa_model()
    head = {id(p) for layer in model.model.layers for p in layer.self_attn.selector.parameters()}
    assert len(head) == 4
    decayed = {id(p) for group in parameter_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    assert not head & decayed and id(model.lm_head.weight) in decayed
    muon, adamw = build_optimizer(model, TrainRecipe(optimizer="muon")).parts
    assert not head & {id(p) for group in muon.param_groups for p in group["params"]}
    assert head <= {id(p) for group in adamw.param_groups for p in group["params"]}


# --- what is kept of cached tokens


RULE = Selection(
    6, 4, mean_size=4, mean_stride=2, sink_blocks=1, local_blocks=1, query_blocks=1, lse="coarse"
)  # windows, coarse windows and importance


class Rows:
    """A cache filled by hand, its rows with left padding, and what should be kept of them, from the tokens themselves."""

    def __init__(self, starts=(0, 3, 11), fixed=None, width=90):
        _, self.k, self.v = (
            x.detach() for x in random_qkv(len(starts), 1, width, 2, 2, 4, seed=len(starts), dtype=torch.float32)
        )
        self.bias = torch.randn(len(starts), width, 2)
        self.starts, self.cache, self.fixed, self.rows = torch.tensor(starts), BlockCache(fixed), fixed, None
        self.seen = 0

    def add(self, count):
        cut = slice(self.seen, min(self.seen + count, self.k.shape[1]))
        self.seen = cut.stop
        positions = torch.arange(cut.start, cut.stop) - self.starts[:, None]
        if cut.stop - cut.start > 1:
            positions = None if not self.starts.any() else positions
        bounds = self.cache.bounds(len(self.starts), cut.stop - cut.start, positions, self.k.device)
        _, _, _, rows = self.cache.append(0, self.k[:, cut], self.v[:, cut], self.bias[:, cut], positions, bounds)
        from ssa.attention.state import CachedRows, RowBounds  # as a pass with one token finds them

        bounds = RowBounds(self.starts, self.seen - self.starts)
        self.rows = CachedRows(self.cache.layers[0], bounds, self.seen, True) if rows is None else rows
        return self

    def check(self, what=""):
        windows, coarse = self.rows.windows(4, 2), self.rows.windows(16, 8)
        importance = self.rows.importance(RULE)
        assert importance.dtype == torch.float32 and importance.shape[1] == -(-self.seen // 4)
        for b, start in enumerate(self.starts.tolist()):
            k, bias = self.k[b, start : self.seen].double(), self.bias[b, start : self.seen].double()
            for found, size, stride in ((windows, 4, 2), (coarse, 16, 8)):
                count = max(0, len(k) - size + stride) // stride
                assert found.shape[1] >= count
                for j in range(count):
                    wanted = k[j * stride : j * stride + size].mean(0)
                    torch.testing.assert_close(
                        found[b, j].double(), wanted, rtol=1e-5, atol=1e-6, msg=f"{what} window {j} of row {b}"
                    )
            wanted = torch.full((importance.shape[1], 2), -float("inf"), dtype=torch.float64)
            for j in range(max(0, len(k) - 2) // 2):
                for n in range(2 * j // 4, (2 * j + 3) // 4 + 1):
                    wanted[n] = torch.maximum(wanted[n], bias[2 * j : 2 * j + 4].mean(0))
            settled = max(0, len(k) - 2) // 4  # blocks whose windows are all complete: others are never chosen by importance
            torch.testing.assert_close(
                importance[b, :settled].double(), wanted[:settled], rtol=1e-5, atol=1e-6, msg=f"{what} importance of row {b}"
            )
        return self


FIXED = pytest.mark.parametrize("fixed", [None, 90], ids=["growing", "fixed"])


@FIXED
@pytest.mark.parametrize("starts", [(0, 0, 0), (0, 3, 11)], ids=["plain", "left padding"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_kept_is_what_the_tokens_say(chunk, starts, fixed):
    rows = Rows(starts, fixed)
    while rows.seen < 90:
        rows.add(chunk).check(f"after {rows.seen} tokens:")


@FIXED
def test_kept_of_a_prompt_and_then_token_by_token(fixed):
    """Asked for at once, or only now and then."""
    rows = Rows(fixed=fixed).add(23).check()
    for _ in range(30):
        rows.add(1).check()
    for chunk in (1, 1, 7, 1, 9, 1, 1):  # nobody asks in between
        rows.add(chunk)
    rows.check()


@FIXED
def test_kept_after_crop_reorder_repeat_and_reset(fixed):
    rows = Rows(fixed=fixed).add(60).check()
    for _ in range(5):
        rows.add(1).check()
    rows.cache.crop(-22)
    rows.seen = 43
    for x in (rows.k, rows.v, rows.bias):
        x[:, 43:] = x[:, 43:].flip(1)
    for chunk in (1, 1, 1, 5, 1):
        rows.add(chunk).check("cropped:")
    order = torch.tensor([2, 0, 0])
    rows.cache.reorder_cache(order)
    rows.k, rows.v, rows.bias, rows.starts = (x[order] for x in (rows.k, rows.v, rows.bias, rows.starts))
    for chunk in (1, 1, 3, 1):
        rows.add(chunk).check("reordered:")
    rows.cache.batch_repeat_interleave(2)
    rows.k, rows.v, rows.bias, rows.starts = (x.repeat_interleave(2, 0) for x in (rows.k, rows.v, rows.bias, rows.starts))
    for x in (rows.k, rows.v, rows.bias):  # the copies part
        x[1::2, rows.seen :] += 1.0
    for chunk in (1, 1, 2, 1):
        rows.add(chunk).check("repeated:")
    if fixed:
        rows.cache.reset()
        rows.seen = 0
        for x in (rows.k, rows.v, rows.bias):
            x += 1.0
        for chunk in (20, 1, 1, 9, 1):
            rows.add(chunk).check("reset:")


def test_a_crop_to_nothing_forgets_everything():
    rows = Rows(fixed=90).add(60).check()
    rows.cache.crop(-60)
    rows.seen = 0
    for x in (rows.k, rows.v, rows.bias):
        x.copy_(x.flip(1))
    for chunk in (1, 1, 5, 1, 1):
        rows.add(chunk).check()


# --- the authors' faults, by number; 7, 14 are of their offloading, 10 of RoPE's table


@torch.no_grad()
def decoded(model, x, first, chunk=1, **options):
    """Logits of the tokens from `first` on, decoded."""
    cache = BlockCache()
    outs = [model(x[:, :first], cache=cache, use_cache=True, **options).logits[:, -1:]]
    for t in range(first, x.shape[1], chunk):
        outs.append(model(x[:, t : t + chunk], cache=cache, use_cache=True, **options).logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_fault_1_decode_bias_is_added_after_scaling(mode):
    """The same bias in one pass and in decoding: a bias of 1 / sqrt(D) of it would show."""
    model, x = nosa_model(), tokens()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.selector.A *= 3
    whole = model(x, attention_mode=mode, use_cache=False).logits
    torch.testing.assert_close(decoded(model, x, 40, attention_mode=mode), whole[:, 39:], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.selector.A /= 8**0.5
    assert (model(x, attention_mode=mode, use_cache=False).logits - whole)[:, 39:].abs().max() > 1e-2


def test_fault_2_rows_of_a_batch_do_not_share_means_or_importance():
    model, x = nosa_model(), tokens(3)
    together = decoded(model, x, 40)
    for row in range(3):
        torch.testing.assert_close(decoded(model, x[row : row + 1], 40), together[row : row + 1], rtol=2e-5, atol=2e-5)


def test_fault_3_every_row_sees_the_windows_that_decoding_adds():
    rows = Rows((0, 2, 7)).add(30).check()
    before = rows.rows.windows(4, 2).clone()
    for _ in range(20):
        rows.add(1)
    rows.check()
    assert rows.rows.windows(4, 2).shape[1] == before.shape[1] + 10


@FIXED
def test_fault_4_new_windows_are_not_dropped(fixed):
    """Beyond the room that the prompt took."""
    rows = Rows((0, 0), fixed=fixed and 400, width=400).add(10)
    rows.rows.importance(RULE)
    while rows.seen < 400:
        rows.add(1)
        rows.rows.windows(4, 2), rows.rows.importance(RULE)
    rows.check()
    assert rows.rows.importance(RULE)[:, :99].isfinite().all()


def test_fault_5_blocks_created_later_are_scored():
    """By query, and by importance, from a cache that was filled when they did not exist."""
    rows, selector = Rows((0, 0), width=90), a_selector(2, 2, 4)
    rows.k[:, 40:44, 0] = 9.0  # block 10: what queries of the first kv head look for
    rows.bias[:, 48:52, 1] = 9.0  # block 12: important for the second
    call, q = AttentionCall("sparse", Selection(5, 4)), torch.ones(2, 1, 2, 4)
    rows.add(30)
    found = []
    while rows.seen < 90:
        rows.add(1)
        inputs = AttentionInputs(
            q, rows.k[:, : rows.seen], rows.v[:, : rows.seen], bias_BSK=rows.bias[:, : rows.seen], cached=rows.rows
        )
        found.append(selector.select(inputs, call)[:, :, 0])
    for seen, index in zip(range(31, 91), found, strict=True):
        for head, block in ((0, 10), (1, 12)):
            assert (index[:, head] == block).any(-1).all() == (seen > 4 * block), (seen, head)


def test_fault_6_the_tail_is_read_whatever_block_begins():
    """Over many blocks that begin while decoding: the query's own and its local ones are among the chosen, and nothing is overwritten."""
    model, x, seen = nosa_model(), tokens(2, 90), []
    whole = model(x, use_cache=False).logits
    torch.testing.assert_close(
        decoded(model, x, 30, observer=lambda layer, record: seen.append(record.block_indices)),
        whole[:, 29:],
        rtol=2e-5,
        atol=2e-5,
    )
    for i, index in enumerate(seen[2:]):
        own = (30 + i // 2) // 4
        assert all((index == n).any(-1).all() for n in (0, own - 1, own))


def test_fault_9_any_number_of_heads_and_no_overflow():
    """softplus of what exp cannot hold; kv heads and head sizes that are no powers of two; with a bias and without."""
    for delta_bias in (False, True):
        selector = a_selector(9, 3, 24, delta_bias=delta_bias)
        _, k, v = random_qkv(1, 4, 4, 9, 3, 24, dtype=torch.float32)
        scores = (1000 * v).flatten(2) @ selector.delta.weight.T + (selector.delta.bias if delta_bias else 0.0)
        bias = selector.key_bias(k, 1000 * v)
        assert scores.max() > 100 > -100 > scores.min()
        torch.testing.assert_close(bias, selector.A * scores.clamp(min=0), rtol=1e-4, atol=1.0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(bias.sum(), list(selector.parameters())))


def test_fault_11_budgets_and_shares_are_options():
    """Of a pass, too: what a budget adds is chosen by importance."""
    model, x, seen = nosa_model(), tokens(1), {}
    for budget in ("4x4", "5x4", "9x4"):
        model(x, budget=budget, use_cache=False, observer=lambda layer, r, n=budget: seen.setdefault(n, r.block_indices))
    assert [seen[n].shape[3] for n in seen] == [4, 5, 9]
    small, middle, large = ({*row[row >= 0].tolist()} for row in (seen[n][0, 0, -1] for n in seen))
    assert small < middle < large


@pytest.mark.parametrize("prompt", [1, 2, 3, 5])
def test_fault_12_short_prompts_and_rows_of_unequal_length(prompt):
    model, x = nosa_model(), tokens(2, 30)
    torch.testing.assert_close(decoded(model, x, prompt), model(x, use_cache=False).logits[:, prompt - 1 :], rtol=2e-5, atol=2e-5)
    mask = torch.ones_like(x)
    mask[1, : 28 - prompt] = 0
    last = model(x, attention_mask=mask, use_cache=False).logits[1:, 28 - prompt :]
    alone = model(x[1:, 28 - prompt :], use_cache=False).logits
    torch.testing.assert_close(last, alone, rtol=2e-5, atol=2e-5)


def test_fault_13_a_window_counts_as_soon_as_it_is_complete():
    rows = Rows((0, 1), fixed=90)
    for _ in range(40):
        rows.add(1)
        windows, importance = rows.rows.windows(4, 2, room=True), rows.rows.importance(RULE)
        last = (rows.seen - 2) // 2 - 1
        if rows.seen >= 4:
            torch.testing.assert_close(windows[0, last], rows.k[0, 2 * last : 2 * last + 4].mean(0))
            assert importance[0, 2 * last // 4].isfinite().all()


# --- what cannot be


@pytest.mark.parametrize(
    ("budget", "fields"),
    [("3x4", {"selector": "eviction"}), ("2x4", {"selector": "windows"})],
    ids=["eviction", "windows"],
)
def test_a_budget_below_what_is_always_read_is_one_line_wherever_it_is_given(budget, fields):
    options = {"windows": TINY, "eviction": NOSA}[fields["selector"]]
    count, message = (
        int(budget[0]),
        f"budget {budget} is less than what is always read: 1 sinks .* give at least {int(budget[0]) + 1}x4",
    )
    known = fields | {"selector_options": options}
    with pytest.raises(UserError, match=message):
        tiny_model("moba", num_selected_blocks=count, **known)
    model, x = tiny_model("moba", num_selected_blocks=count + 1, **known), tokens(1, 20)
    model(x)
    for reading in (budget, ["full", budget]):
        with pytest.raises(UserError, match=message) as error:
            model(x, budget=reading)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        model.generate(x, max_new_tokens=2, budget=budget)


def a_recipe(**model):
    return Recipe(model=ModelRecipe(**({"method": "nosa", "block_size": 4, "selector_options": NOSA} | model)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_selected_blocks": 3}, "budget 3x4 is less than what is always read"),
        ({"selector_options": NOSA | {"mean_stride": 3}}, "mean_stride = 3 must divide"),
        ({"selector_options": NOSA | {"query_block": 3}}, "selector_options.query_block is no option of eviction"),
        ({"selector_options": NOSA | {"lse": "fine"}}, "lse = 'fine' is not one of exact, coarse"),
        ({"selection_rule": "released"}, "'released' knows no windows"),
    ],
)
def test_recipes_of_what_cannot_be(change, message):
    a_recipe(num_selected_blocks=4)
    with pytest.raises(UserError, match=message) as error:
        a_recipe(**({"num_selected_blocks": 4} | change))
    assert "\n" not in str(error.value)


def test_branches_have_no_bias():
    with pytest.raises(UserError, match="eviction adds a bias, which the branches of method nsa do not have"):
        tiny_model("nsa", selector="eviction", selector_options=NOSA, num_selected_blocks=5)
    tiny_model("nsa", selector="windows", selector_options=TINY, num_selected_blocks=5)


def test_shared_values_are_not_shared_out():
    _, k, v = random_qkv(1, 4, 4, 4, 2, 8, dtype=torch.float32)
    with pytest.raises(UserError, match="share the model by FSDP"):
        a_selector().key_bias(k[:, :, :1], v[:, :, :1])


def test_flops_count_the_windows_a_query_sees():
    config = tiny_config("moba", selector="windows", selector_options=TINY)
    shape = HeadShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    selection, ids = Selection(4, 4), torch.arange(10, device="cpu")[None]
    seen = sum(max(0, (i + 1 - 4 + 2) // 2) for i in range(10)) / 10
    assert WindowsSelector(shape, **TINY).flops(selection, ids) == 2 * 4 * 8 * seen
    assert WindowsSelector(shape, **TINY, lse="coarse").flops(selection, ids) == 2 * 4 * 8 * seen * 1.25
