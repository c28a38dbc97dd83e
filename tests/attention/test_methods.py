"""The methods against their formulas, and Theorem 1."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssa.attention import AttentionCall, AttentionMethod, Selector, method
from ssa.attention.selectors.means import MeansSelector
from ssa.budget import Selection
from ssa.errors import UserError
from ssa.methods import Method, SelectorKind, methods, register_method, register_selector, unregister
from ssa.ops import block_means, block_sparse_attention, compressed_attention, dense_attention, select_blocks
from ssa.testing import attend, attention_oracle, document_positions, random_qkv, readable_keys, tiny_model


@pytest.mark.parametrize("method", ["full", "moba", "ssa"])
@pytest.mark.parametrize("mode", ["sparse", "full"])
@pytest.mark.parametrize("positions", [None, document_positions([7, 1, 24])], ids=["plain", "packed"])
def test_inference_is_gated_dense_or_selected_attention(method, mode, positions):
    q, k, v = random_qkv(1, 32, 32, 4, 2, 8)
    gates = torch.rand(1, 32, 4, 1, dtype=torch.float64)
    result = attend(method, q, k, v, gates, AttentionCall(mode, Selection(2, 4), positions_BT=positions))
    index = None
    if mode == "sparse":
        index, _ = select_blocks(q, k, Selection(2, 4), positions=positions)
        assert torch.equal(result.block_indices, index)
    expected, _, _ = attention_oracle(q, k, v, index, block_size=4, positions=positions)
    torch.testing.assert_close(result.ungated_BTHD, expected)
    torch.testing.assert_close(result.out_BTHD, expected * gates)


@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_nsa_is_three_gated_branches(mode):
    q, k, v = random_qkv(1, 40, 40, 4, 2, 8)
    gates = torch.rand(1, 40, 4, 3, dtype=torch.float64)
    result = attend("nsa", q, k, v, gates, AttentionCall(mode, Selection(3, 4)), window_size=6)
    index, _ = select_blocks(q, k, Selection(3, 4))
    selected = block_sparse_attention(q, k, v, index, block_size=4)[0] if mode == "sparse" else dense_attention(q, k, v)
    branches = [compressed_attention(q, k, v, block_size=4)[0], selected, dense_attention(q, k, v, window=6)]
    expected = sum(gates[..., i : i + 1] * branch for i, branch in enumerate(branches))
    torch.testing.assert_close(result.out_BTHD, expected)


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_packed_equals_separate_documents(method, mode):
    lengths = [5, 1, 30, 12]
    q, k, v = random_qkv(1, 48, 48, 4, 2, 8)
    gates = torch.rand(1, 48, 4, methods()[method].num_gates, dtype=torch.float64)
    call = AttentionCall(mode, Selection(2, 4), align=True, positions_BT=document_positions(lengths))
    packed = attend(method, q, k, v, gates, call, window_size=6).out_BTHD
    start = 0
    for n in lengths:
        cut = slice(start, start + n)
        alone = attend(
            method, *(x[:, cut] for x in (q, k, v, gates)), AttentionCall(mode, Selection(2, 4)), window_size=6
        ).out_BTHD
        torch.testing.assert_close(packed[:, cut], alone)
        start += n


@pytest.mark.parametrize(("method", "positions"), [("ssa", None), ("nsa", document_positions([3, 1, 6]))])
def test_kernels_train_as_the_reference_does(method, positions):
    pytest.importorskip("triton")
    if torch.cuda.is_available() and not os.environ.get("SSA_TEST_DEVICE", "cpu").startswith("cuda"):
        pytest.skip("with a GPU at hand the kernels are tested there: SSA_TEST_DEVICE=cuda")
    leaves = random_qkv(1, 10, 10, 2, 1, 16, dtype=torch.float32)
    gates = torch.rand(1, 10, 2, methods()[method].num_gates, requires_grad=True)
    results = []
    for impl in ("reference", "triton"):
        call = AttentionCall("sparse", Selection(2, 2), align=True, positions_BT=positions, impl=impl)
        result = attend(method, *leaves, gates, call, window_size=3)
        total = result.out_BTHD.square().sum()
        if result.alignment is not None:
            total = total + 1000 * result.alignment.sum()
        results.append((result.out_BTHD, result.block_indices, *torch.autograd.grad(total, (*leaves, gates))))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_nsa_pools_once_for_compression_and_selection(monkeypatch):
    from ssa.attention import nsa

    pooled = []
    monkeypatch.setattr(nsa, "block_means", lambda x, size: pooled.append(x) or block_means(x, size))
    monkeypatch.setattr("ssa.ops.select.block_means", None)
    q, k, v = random_qkv(1, 24, 24, 4, 2, 8)
    gates = torch.rand(1, 24, 4, 3, dtype=torch.float64)
    attend("nsa", q, k, v, gates, AttentionCall("sparse", Selection(2, 4)), window_size=6)
    assert [x is y for x, y in zip(pooled, (k, v), strict=True)] == [True, True]


def test_head_scope_lets_every_query_head_choose():
    q, k, v = random_qkv(1, 64, 64, 4, 2, 8)
    call = AttentionCall("sparse", Selection(2, 4, "head", "logit"))
    result = attend("moba", q, k, v, None, call)
    assert result.block_indices.shape == (1, 4, 64, 2)
    assert not torch.equal(result.block_indices[:, 0], result.block_indices[:, 1])


class FirstAndOwn(Selector):
    """A selection of its own: each query reads the first block and its own."""

    def select(self, inputs, call):
        q, k = inputs.q_BTHD, inputs.k_BSKD
        queries, keys = q.shape[1], k.shape[1]
        own = torch.arange(keys - queries, keys) // call.selection.block_size
        rows = torch.stack([torch.zeros_like(own), torch.where(own > 0, own, -1)], -1)
        return rows.int().expand(q.shape[0], k.shape[2], queries, 2).contiguous()


@pytest.fixture
def register():
    """register("mine", cls) makes a class known as method or selector of that name for a test."""
    names = []

    def known(name, cls):
        globals()[name] = cls  # where `implementation` finds it
        if issubclass(cls, Selector):
            register_selector(SelectorKind(name, name, f"{__name__}:{name}"))
        else:
            register_method(Method(name, name, f"{__name__}:{name}", "sparse", "nothing"))
        names.append(name)
        return name

    yield known
    for name in names:
        unregister(name)


class FirstAndOwnOfMeans(MeansSelector):
    """One that changes a fused selector's choice alone."""

    select = FirstAndOwn.select


@pytest.mark.parametrize("own", [None, FirstAndOwn, FirstAndOwnOfMeans])
@torch.no_grad()
def test_decoding_selects_as_the_selector_does(monkeypatch, register, own):
    """Where a GPU would take the fused operation, computed by the reference here."""
    fused = []
    monkeypatch.setattr(method, "resolve", lambda impl, q: "triton")
    monkeypatch.setattr(method, "decode_attention", lambda *a, f=method.decode_attention, **kw: fused.append(a) or f(*a, **kw))
    selector = register("first_and_own", own) if own else "means"
    model, x = tiny_model("moba", selector=selector), torch.randint(0, 256, (2, 41))
    whole = model(x, use_cache=False).logits[:, -1]
    cache = model(x[:, :-1], use_cache=True).cache
    torch.testing.assert_close(model(x[:, -1:], cache=cache, use_cache=True).logits[:, -1], whole, rtol=1e-5, atol=1e-5)
    assert len(fused) == (0 if own else 2)


def test_a_method_that_selects_is_refused(register):
    class Chooses(AttentionMethod):
        select = FirstAndOwn.select

    with pytest.raises(UserError, match="Chooses has a select, which is a selector's business"):
        tiny_model(register("chooses", Chooses))


class Head:
    def __init__(self):
        self.weights, self.itself = {"delta": (torch.nn.Parameter(torch.ones(3)),)}, self


class Loose(AttentionMethod):
    """A method with what a test puts into it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.extra = self.make()


class LooseModule(AttentionMethod, torch.nn.Module):
    def __init__(self, **options):
        torch.nn.Module.__init__(self)
        AttentionMethod.__init__(self, **options)
        self.extra = self.make()


class LooseSelector(FirstAndOwn):
    def __init__(self, shape):
        super().__init__(shape)
        self.extra = self.make()


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(8, 1), lambda: torch.zeros(3), lambda: [torch.nn.Linear(8, 1)], Head])
@pytest.mark.parametrize("kind", [Loose, LooseModule, LooseSelector])
def test_weights_that_no_model_knows_of_are_refused(monkeypatch, register, kind, make):
    monkeypatch.setattr(kind, "make", staticmethod(make), raising=False)
    name = register("loose", kind)
    fields = {"selector": name} if kind is LooseSelector else {"method": name}
    if kind is not Loose and isinstance(make(), torch.nn.Module):  # registered: trained and saved
        weight = f"model.layers.1.self_attn.{'selector' if kind is LooseSelector else 'method'}.extra.weight"
        model = tiny_model(**fields)
        assert weight in model.state_dict() and weight in dict(model.named_parameters())
        return
    with pytest.raises(UserError, match=f"{kind.__name__} holds a (Linear|Tensor|Parameter) in 'extra'") as error:
        tiny_model(**fields)
    assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**16), sharpness=st.sampled_from([0.1, 1.0, 5.0]), count=st.integers(1, 9), shift=st.floats(-3, 3))
def test_theorem_1_bounds_the_error_of_sparse_attention(seed, sharpness, count, shift):
    """||h_full(t) - h_sparse(t)|| <= delta(t) (max over dropped j of ||v(j)|| + ||h_sparse(t)||)."""
    q, k, v = (x.detach() for x in random_qkv(1, 32, 32, 2, 1, 4, seed=seed))
    q, v = q * sharpness, v + shift
    index, _ = select_blocks(q, k, Selection(count, 4))
    full, _, weights = attention_oracle(q, k, v)
    sparse, _ = block_sparse_attention(q, k, v, index, block_size=4)
    read = readable_keys(q, k, None, index, 4)
    causal = readable_keys(q, k, None, None, 1)
    delta = (weights * (causal & ~read)).sum(-1).transpose(1, 2)
    largest = torch.where(causal & ~read, v.norm(dim=-1).view(1, 1, 1, -1), 0.0).amax(-1).transpose(1, 2)
    bound = delta * (largest + sparse.norm(dim=-1))
    assert ((full - sparse).norm(dim=-1) <= bound + 1e-12).all()
