"""StreamingLLM as a selector of another package: the first blocks and the latest ones, whatever the query asks for."""

import torch

from ssa.attention import Selector
from ssa.errors import UserError
from ssa.methods import Method, Option, SelectorKind, register_alias, register_method, register_selector
from ssa.ops.documents import query_positions


class Streaming(Selector):
    def __init__(self, shape, *, sinks):
        super().__init__(shape)
        self.sinks = sinks

    def check(self, selection):
        if selection.num_selected_blocks <= self.sinks:
            raise UserError(f"num_selected_blocks = {selection.num_selected_blocks} must be more than sinks = {self.sinks}")

    def select(self, inputs, call):
        q, k = inputs.q_BTHD, inputs.k_BSKD
        own = query_positions(q, k, call.positions_BT) // call.selection.block_size  # [B, T]
        sinks = torch.arange(self.sinks, device=q.device)
        local = torch.arange(call.selection.num_selected_blocks - self.sinks, device=q.device).flip(0)
        recent = own[..., None] - local
        chosen = torch.cat([sinks.expand(*own.shape, -1), torch.where(recent >= self.sinks, recent, -1)], -1)
        chosen = torch.where(chosen <= own[..., None], chosen, -1)
        chosen = chosen.masked_fill(chosen < 0, 2**31 - 1).sort(-1).values  # -1 to the right
        chosen = chosen.masked_fill(chosen == 2**31 - 1, -1).int()
        return chosen[:, None].expand(-1, k.shape[2], -1, -1).contiguous()

    def flops(self, selection, position_ids):
        return 0.0  # a query is not looked at


def register():
    """What the package's entry point of the group `ssa.methods` names."""
    options = {"sinks": Option(1, "blocks at the start that everybody reads")}
    register_selector(SelectorKind("streaming", "sinks + local", f"{__name__}:Streaming", options))
    register_method(Method("plain", "Plain", "ssa.attention.moba:MoBA", "sparse", "sparse attention", marker="square"))
    register_alias("streamingllm", "plain", "streaming")
