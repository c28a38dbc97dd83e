"""What every selector is: how blocks are chosen, with which weights, from what it keeps of cached tokens, and at which cost.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, M selected blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ssa.attention.inputs import AttentionCall, AttentionInputs
from ssa.attention.registered import check_registered
from ssa.budget import Selection

if TYPE_CHECKING:
    from ssa.attention.state import CachedRows


class HeadShape(NamedTuple):
    """The heads of a layer."""

    heads: int
    kv_heads: int
    head_dim: int


class Kept(NamedTuple):
    """What `ssa.ops.select_blocks` and `decode_attention` take of cached tokens."""

    means: Tensor
    coarse: Tensor | None = None
    importance: Tensor | None = None


class Selector(nn.Module):
    """One a layer, at `self_attn.selector`. Its parameters are trained and saved with the model's; one without any leaves state dicts alone.

    A subclass has `select` and `flops`; `key_bias` and what it keeps of a cache (`ssa.attention.state.SelectorState`) where it needs them.
    Its options, as registered in `ssa.methods`, are keyword arguments of its `__init__`.
    """

    fused: ClassVar[bool] = False
    """`ssa.ops.decode_attention` chooses exactly as this class's `select` does, and may stand in for it where few tokens are decoded. A
    subclass with a `select` of its own says so anew."""
    adds_bias: ClassVar[bool] = False
    """`key_bias` gives one."""
    weight_decay: ClassVar[bool] = True
    """Whether its matrices decay as the model's do."""
    muon: ClassVar[bool] = True
    """Whether Muon may train its matrices; otherwise AdamW does."""
    loss_weight: float = 0.0
    """What its own `loss` weighs beside the cross-entropy; 0: it has none."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "select" in vars(cls) and "fused" not in vars(cls):
            cls.fused = False  # inherited, it would be another class's selection that decodes

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape

    def reset_parameters(self) -> None:
        """The start of its weights, after the model's rule for linear layers has run over them."""

    def check_registered(self) -> None:
        """Raises `UserError` for a tensor that it holds without its being a parameter or buffer."""
        check_registered(self, "selector")

    def check(self, selection: Selection) -> None:
        """Raises `UserError` for a selection that it cannot make (a budget smaller than what it always reads, say)."""
        self.rule(selection)

    def rule(self, selection: Selection) -> Selection:
        """What it makes of a selection that names a budget; of one that it has made, the same."""
        return selection

    def kept(self, cached: CachedRows, selection: Selection, room: bool = False) -> Kept:
        """Of a fused selector: what its operation takes of cached tokens, by its rule; with `room`, for as many as the buffers hold."""
        raise NotImplementedError(f"{type(self).__name__} is fused and has no kept")

    def select(self, inputs: AttentionInputs, call: AttentionCall) -> Tensor:
        """The blocks that each query reads; nothing here needs a gradient.

        Returns:
            int32 [B, K or H, T, M], document-relative, ascending, unique in a row, right-padded with -1; no block starts after its
            query, and the query's own block is among them. M is at most `rule(call.selection).places`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no select")

    def key_bias(self, k: Tensor, v: Tensor) -> Tensor | None:
        """fp32 [B, T, K], added to the logits of these keys in every stream; k after RoPE and v are [B, T, K, D] of new tokens."""
        return None

    def loss(self, inputs: AttentionInputs, call: AttentionCall) -> Tensor | None:
        """fp32 scalar of one layer, a mean over what it looks at; asked for in training where `loss_weight` is not 0."""
        return None

    def flops(self, selection: Selection, position_ids: Tensor) -> float:
        """FLOPs of choosing for one token in one layer, the mean over `position_ids`, int [B, T] on the CPU. Without a gradient a
        multiplication with its addition counts two."""
        raise NotImplementedError(
            f"{type(self).__name__} has no flops: what choosing costs a token in one layer; 0.0 for nothing"
        )
