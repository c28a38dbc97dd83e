"""The model: Llama's blocks around one attention layer whose method is a field of the configuration.

Legend: B batch, T queries, S keys, H query heads, K kv heads, D head size, C hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.utils.generic import can_return_tuple

from ssa.attention import AttentionCall, AttentionInputs, AttentionRecord, Selector
from ssa.attention.method import with_selection_loss
from ssa.budget import AttentionMode, Budget, Full, LayerBudgets, LayerReading, Reading, parse_layer_reading
from ssa.errors import UserError
from ssa.files import follow_umask
from ssa.model.alignment import carry, warn_of_counted_starts, warn_of_eval_mode, weight_in_loss
from ssa.model.cache import CACHE_FIELD, BlockCache, BlockCacheGeneration, CacheByEitherName, one_cache
from ssa.model.configuration import SSAConfig, build_attention
from ssa.model.inference import fused_layers, last_norm, runs_fused
from ssa.model.inputs import document_positions, refuse_typos, shifted_targets
from ssa.model.step import DecodeSteps
from ssa.model.streams import TrainStep, follow_trainers
from ssa.ops.cross_entropy import SLICE_ELEMENTS, linear_cross_entropy
from ssa.ops.documents import cu_seqlens_from_positions

Readings: TypeAlias = Reading | str | Sequence[LayerReading | str]
"""A budget or full attention, for all layers or one a layer. `LayerBudgets` says what sparse attention reads in each layer; a list says whether it is sparse there, too."""


class SSAAttention(nn.Module):
    """Projections, RoPE, cache and gate around a method and a selector of `ssa.attention`."""

    def __init__(self, config: SSAConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.num_gates, self.main_gate = config.attends.num_gates, config.attends.main_gate
        self.method, self.selector = build_attention(config)
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.g_proj = None
        if config.attention_gate:
            self.g_proj = nn.Linear(width, config.num_attention_heads * self.num_gates, bias=False)

    def forward(
        self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], call: AttentionCall, cache: BlockCache | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(output, alignment losses, the selector's loss)"""
        q, k, v = self._project(x_BTC, rope, call)
        gates = None
        if self.g_proj is not None:
            gates = self.g_proj(x_BTC).float().sigmoid().unflatten(-1, (-1, self.num_gates))
        bias, cached = self.selector.key_bias(k, v), None
        if cache is not None:
            assert call.bounds is not None
            k, v, bias, cached = cache.append(self.layer_idx, k, v, bias, call.positions_BT, call.bounds)
        inputs = AttentionInputs(q, k, v, gates, bias, cached)
        result = with_selection_loss(self.method(self.selector, inputs, call), self.selector, inputs, call)
        if call.observer is not None:
            main_gate = None if gates is None else gates[..., self.main_gate]
            seen = AttentionRecord(
                q, k, v, main_gate, call.positions_BT, result.block_indices, call.mode, call.selection, result.ungated_BTHD, bias
            )
            call.observer(self.layer_idx, seen)
        return self.o_proj(result.out_BTHD.flatten(2)), result.alignment, result.selection_loss

    def _project(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D] and k, v [B, T, K, D], q and k after RoPE."""
        q, k, v = (p(x_BTC) for p in (self.q_proj, self.k_proj, self.v_proj))
        if q.shape[-1] != self.o_proj.in_features:
            self._check_tensor_parallel(k, call)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *rope, unsqueeze_dim=2)
        return q.to(v.dtype), k.to(v.dtype), v  # autocast leaves v in low precision and RoPE's tables in fp32

    def _check_tensor_parallel(self, k: Tensor, call: AttentionCall) -> None:
        """This rank has some of the heads; k is the projection's output."""
        if k.shape[-1] % self.head_dim:
            heads = self.k_proj.out_features // self.head_dim
            raise UserError(f"tensor parallelism shares out whole heads: the number of ranks must divide the {heads} kv heads")
        if call.align:
            raise UserError(
                "the alignment is a mean over all heads, which tensor parallelism does not train: share the model by FSDP, or set alignment_loss to none"
            )


class SSADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: SSAConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = SSAAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, x_BTC: Tensor, rope: tuple[Tensor, Tensor], call: AttentionCall, cache: BlockCache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        attended, alignment, selection_loss = self.self_attn(self.input_layernorm(x_BTC), rope, call, cache)
        x_BTC = x_BTC + attended
        return x_BTC + self.mlp(self.post_attention_layernorm(x_BTC)), alignment, selection_loss


class SSAPreTrainedModel(PreTrainedModel):
    config_class = SSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSADecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["selector"]  # few weights, whose differences order the keys

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Selector):
            module.reset_parameters()

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs) -> None:
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            follow_umask(*Path(save_directory).glob("model*.safetensors"))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """As `SSAConfig.register_for_auto_class`."""

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        if (
            getattr(distributed_config, "pp_size", None) or 1
        ) > 1:  # transformers would split any model, layers of two results wrongly
            raise UserError(f"pp_size = {distributed_config.pp_size}: the model runs in no pipeline; use tp_size or fsdp_size")
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)


@dataclass
class SSAModelOutput(CacheByEitherName, BaseModelOutputWithPast):
    alignment: Tensor | None = None
    """fp32 [2], mean over layers of (sparsity loss, commitment loss), with its graph. In training the hidden states carry it into
    whatever loss they end up in; who adds it to a loss passes `carry_alignment=False`."""
    selection_loss: Tensor | None = None
    """fp32 scalar, mean over layers of the selectors' own loss, with its graph; carried likewise."""


class SSAModel(SSAPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: SSAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SSADecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.impl = "auto"
        self.gradient_checkpointing = False
        self.train_step = TrainStep()
        """What is known of the optimizer step in training, unless the caller passes `stream` and weighs the alignment."""
        self.steps = DecodeSteps()
        """How decoding steps are launched."""
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        attention_mode: AttentionMode | None = None,
        budget: Readings | None = None,
        stream: AttentionMode | None = None,
        cu_seqlens: Tensor | None = None,
        observer: Callable[[int, AttentionRecord], None] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: BlockCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        row_blocks: Tensor | None = None,
        carry_alignment: bool = True,
        **kwargs,
    ) -> SSAModelOutput | tuple:
        """See `SSAForCausalLM.forward`.

        carry_alignment: a loss of the hidden states trains the alignment, too (`ssa.model.alignment`).
        """
        refuse_typos(kwargs, SSAModel.forward)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("pass either input_ids or inputs_embeds")
        if output_attentions:
            raise UserError("output_attentions = True: attention weights are never held; pass an observer, or use ssa analyze")
        x_BTC = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        cache = one_cache(cache, past_key_values)
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            use_cache, cache = False, None  # a layer that runs again in the backward pass would write its keys a second time
        if use_cache and cache is None:
            cache = BlockCache()
        position_ids = document_positions(position_ids, cu_seq_lens_q, seq_idx, x_BTC, cache)
        past = 0 if cache is None else cache.get_seq_length()
        # What a training loop hands over is not checked on the GPU, where looking at it would stall the step; a graph cannot look.
        checked = not ((self.training and x_BTC.is_cuda) or torch.compiler.is_compiling())
        positions_BT, padding_BT = _positions(attention_mask, position_ids, x_BTC, past, checked)
        if positions_BT is None or past or padding_BT is not None:
            cu_seqlens = None
        queries = x_BTC.shape[1]
        if positions_BT is not None and cu_seqlens is None and x_BTC.is_cuda and not (past and queries == 1):
            # once, not in every layer
            cu_seqlens = cu_seqlens_from_positions(positions_BT, past + queries if past else None)
        bounds = None if cache is None else cache.bounds(len(x_BTC), queries, positions_BT, x_BTC.device)
        call = self._attention_call(attention_mode, stream, observer)
        call = replace(
            call, positions_BT=positions_BT, padding_BT=padding_BT, cu_seqlens=cu_seqlens, bounds=bounds, row_blocks_B=row_blocks
        )
        calls = self._by_layer(call, attention_mode, budget)
        if row_blocks is not None and all(call.mode == "full" for call in calls):
            raise UserError(
                "row_blocks say how many blocks a row reads, and full attention reads all: use sparse attention or leave them out"
            )
        absolute_BT = positions_BT
        if absolute_BT is None:
            absolute_BT = torch.arange(past, past + x_BTC.shape[1], device=x_BTC.device)[None]
        hidden_states: tuple[Tensor, ...] = ()
        alignments: list[Tensor] = []
        selection_losses: list[Tensor] = []
        if cache is not None and not output_hidden_states and runs_fused(self, x_BTC, call):
            rope = self.rotary_emb(absolute_BT.float(), absolute_BT)
            with torch.cuda.device_of(x_BTC):  # where kernels are launched
                x_BTC = fused_layers(self, x_BTC if inputs_embeds is None else x_BTC.clone(), rope, calls, cache)
                x_BTC = last_norm(self, x_BTC)
            return SSAModelOutput(last_hidden_state=x_BTC, **{CACHE_FIELD: cache if use_cache else None})
        rope = self.rotary_emb(x_BTC, absolute_BT)
        for layer, call in zip(self.layers, calls, strict=True):
            if output_hidden_states:
                hidden_states += (x_BTC,)
            x_BTC, alignment, selection_loss = layer(x_BTC, rope, call, cache=cache)
            if alignment is not None:
                alignments.append(alignment)
            if selection_loss is not None:
                selection_losses.append(selection_loss)
        x_BTC = self.norm(x_BTC)
        alignment = torch.stack(alignments).mean(0) if alignments else None
        weight = self.config.alignment_weight if self.config.aligns else 0
        if alignment is not None and alignment.requires_grad and carry_alignment and weight:
            x_BTC = carry(x_BTC, alignment, weight, self.train_step, self.parameters())
        elif (
            (weight or self.selector.loss_weight)
            and not self.training
            and attention_mode is None
            and x_BTC.requires_grad
            and not torch.compiler.is_compiling()
        ):
            warn_of_eval_mode(x_BTC)
        selection_loss = torch.stack(selection_losses).mean() if selection_losses else None
        if selection_loss is not None and selection_loss.requires_grad and carry_alignment:
            x_BTC = carry(x_BTC, selection_loss, self.selector.loss_weight, self.train_step, self.parameters())
        if output_hidden_states:
            hidden_states += (x_BTC,)
        return SSAModelOutput(
            last_hidden_state=x_BTC,
            hidden_states=hidden_states or None,
            alignment=alignment,
            selection_loss=selection_loss,
            **{CACHE_FIELD: cache if use_cache else None},
        )

    def decoding_calls(
        self, attention_mode: AttentionMode | None = None, budget: Readings | None = None
    ) -> Sequence[AttentionCall]:
        """What a pass without gradients asks of each layer, but for what depends on its tokens."""
        return self._by_layer(self._attention_call(attention_mode, None), attention_mode, budget)

    def _attention_call(
        self, attention_mode: AttentionMode | None, stream: AttentionMode | None,
        observer: Callable[[int, AttentionRecord], None] | None = None,
    ) -> AttentionCall:  # fmt: skip
        """What a pass asks for, but for what depends on its tokens."""
        config = self.config
        for name, value in (("attention_mode", attention_mode), ("stream", stream)):
            if value not in (None, "sparse", "full"):
                raise UserError(f"{name} = {value!r} is neither 'sparse' nor 'full'")
        align = train = False
        # Without gradients nobody trains, whatever the module's mode: a policy that generates, a reference, a metric.
        if self.training and attention_mode is None and (stream is not None or torch.is_grad_enabled()):
            mode: AttentionMode = config.attends.training_mode
            train = torch.is_grad_enabled()
            if config.attends.draws_stream:
                mode = stream or self.train_step.draw(config.stream_seed, config.full_ratio)
                align = True
        else:
            mode = attention_mode or config.attention_mode
        return AttentionCall(mode, config.selection(), align, train, impl=self.impl, observer=observer)

    @property
    def selector(self) -> Selector:
        """The first layer's; all layers have the same kind, with the same options."""
        return cast(SSADecoderLayer, self.layers[0]).self_attn.selector

    def _by_layer(
        self, call: AttentionCall, attention_mode: AttentionMode | None, budget: Readings | None
    ) -> Sequence[AttentionCall]:
        """What each layer is asked for."""
        layers = len(self.layers)
        if budget is None:
            if self.config.layer_budgets is None:
                return [call] * layers
            if call.train or call.align:
                raise UserError(
                    "layer_budgets are not for training: set config.layer_budgets = None, train, and tune the budgets again"
                )
            budget = self.config.budget
        given: list[LayerReading | str] = [budget] if isinstance(budget, (str, Budget, Full)) else list(budget)
        if len(given) not in (1, layers):
            raise UserError(f"budget names {len(given)} layers, and the model has {layers}: name one for all or one a layer")
        if isinstance(budget, LayerBudgets) and len(budget) == layers:
            return [self._sparse_reading(call, reading) for reading in budget]
        calls = [self._read(call, parse_layer_reading(reading), attention_mode, len(given) > 1) for reading in given]
        return calls if len(given) > 1 else calls * layers

    def _sparse_reading(self, call: AttentionCall, reading: LayerReading) -> AttentionCall:
        """Of one layer, in a pass of either mode."""
        if isinstance(reading, Budget):
            selection = self.config.selection(reading)
            self.selector.check(selection)
            return replace(call, selection=selection)
        if call.align:
            raise UserError("budget = 'full' contradicts training: name a budget of blocks for each layer")
        own = self.config.selection()
        blocks = max(own.num_selected_blocks, -(-self.config.max_position_embeddings // own.block_size))
        # who looks on finds a selection that leaves nothing out, by the one rule that has any number of blocks
        return replace(call, mode="full", selection=replace(own, num_selected_blocks=blocks, rule="exact"))

    def _read(
        self, call: AttentionCall, reading: LayerReading, attention_mode: AttentionMode | None, of_one_layer: bool
    ) -> AttentionCall:
        if not isinstance(reading, Full):
            selection = self.config.selection(reading)
            self.selector.check(selection)
            if of_one_layer and attention_mode == "full":
                raise UserError("budgets for each layer say which read everything: leave out attention_mode = 'full'")
            # where layers differ, one that names a budget reads it
            mode: AttentionMode = "sparse" if of_one_layer and not call.align else call.mode
            return replace(call, mode=mode, selection=selection)
        if call.align or attention_mode == "sparse":
            raise UserError("budget = 'full' contradicts training or attention_mode = 'sparse': name a budget of blocks")
        return replace(call, mode="full")


def _positions(
    attention_mask: Tensor | None, position_ids: Tensor | None, x_BTC: Tensor, past: int, checked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(document-relative positions int64 [B, T] or None for plain rows, padding mask [B, T] or None).

    `checked` looks at the values: full masks and plain positions then take the fast paths, and wrong positions are an error.
    """
    batch, queries = x_BTC.shape[:2]
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UserError(f"attention_mask has {attention_mask.ndim} dimensions; pass the 2-D padding mask [B, S]")
    if attention_mask is not None and attention_mask.shape != (batch, past + queries):
        raise UserError(f"attention_mask {tuple(attention_mask.shape)} is not [B, S] = [{batch}, {past + queries}]")
    padded = attention_mask is not None and not (checked and bool(attention_mask.all()))
    if position_ids is None and not padded:
        return None, None
    columns = torch.arange(past, past + queries, device=x_BTC.device)
    if position_ids is None:
        assert attention_mask is not None
        position_ids = attention_mask.to(torch.int64).cumsum(1)[:, past:] - 1
    position_BT = position_ids.to(torch.int64).expand(batch, queries)
    padding_BT = None
    if padded:
        assert attention_mask is not None
        padding_BT = attention_mask[:, past:] == 0
        # padding tokens become documents of one token: they read themselves and nobody reads them
        position_BT = torch.where(padding_BT, 0, position_BT)
    elif checked and bool((position_BT == columns).all()):
        return None, None
    if checked and bool(((position_BT < 0) | (position_BT > columns)).any()):
        raise UserError(
            "position_ids must count from 0 in each document: a position is negative or larger than the number of tokens before it"
        )
    if padded and checked:
        assert attention_mask is not None and padding_BT is not None
        # What a query reads is a span of columns, from its document's start to itself: no padding may lie in it.
        pads = torch.nn.functional.pad((attention_mask == 0).to(torch.int64).cumsum(1), (1, 0))
        inside = pads.gather(1, (columns + 1).expand_as(position_BT)) - pads.gather(1, columns - position_BT)
        if bool(((inside > 0) & ~padding_BT).any()):
            raise UserError(
                "attention_mask has padding between the tokens of a document, or position_ids count it: pad before the first or after the last token only"
            )
    return position_BT, padding_BT


@dataclass
class SSACausalLMOutput(CacheByEitherName, CausalLMOutputWithPast):
    """Output of `SSAForCausalLM`; the parts of the loss are detached fp32 scalars."""

    cross_entropy: Tensor | None = None
    sparsity_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    alignment: Tensor | None = None
    """fp32 [2], sparsity and commitment loss with their graph, for callers that compose the loss themselves."""
    selection_loss: Tensor | None = None
    """fp32 scalar, the selectors' own loss with its graph."""


class SSAForCausalLM(BlockCacheGeneration, SSAPreTrainedModel, GenerationMixin):
    """Language model with natively trainable sparse attention; a `transformers` model in every respect."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SSAConfig) -> None:
        super().__init__(config)
        self.model = SSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def train_step(self) -> TrainStep:
        return self.model.train_step

    @property
    def stream_step(self) -> int:
        """Number of the step whose stream the next training pass follows."""
        return self.train_step.number

    @stream_step.setter
    def stream_step(self, step: int) -> None:
        self.train_step.number = step

    @property
    def accepts_loss_kwargs(self) -> bool:
        """`forward` takes `num_items_in_batch`. A `Trainer` asks while it is built, before it collects its callbacks."""
        follow_trainers()
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        attention_mode: AttentionMode | None = None,
        budget: Readings | None = None,
        stream: AttentionMode | None = None,
        cu_seqlens: Tensor | None = None,
        observer: Callable[[int, AttentionRecord], None] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: BlockCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        row_blocks: Tensor | None = None,
        **kwargs,
    ) -> SSACausalLMOutput | tuple:
        """One pass over [B, T] tokens.

        Args:
            attention_mask: [B, S], 0 = padding, before the first or after the last token of a row, never between.
            cache: What earlier passes left, which this pass extends; transformers before 5.24 call it `past_key_values`.
            position_ids: int [B, T]. Where they restart at 0 a new document starts, and nothing crosses it.
            labels: int [B, T], `input_ids` with -100 where there is nothing to learn; shifted inside. Padding and the first token
                of a document are never targets.
            attention_mode: "sparse" or "full"; the configuration's in inference, the method's stream in training by default.
            budget: `Budget` or "kxs", blocks a query may read; the configuration's by default. "full" or `ssa.budget.FULL` is full attention.
                A list has one for each layer, and so has the configuration's `layer_budgets`, which training refuses.
            stream: SSA in training: the stream that goes on, where the caller draws it (`ssa.model.streams`).
            cu_seqlens: int32 [documents + 1], where documents begin in the flattened batch, beside `position_ids`: spares a GPU one
                wait (`ssa.ops.documents.cu_seqlens_from_positions`, on the CPU).
            observer: called as observer(layer, AttentionRecord) by every layer.
            num_items_in_batch: targets of a whole step, which has several passes (`train_step.micro_batches`): the loss is then this
                pass's part of the step's, and their sum over passes (and the mean over ranks, times their number) is the step's.
            logits_to_keep: compute logits of the last so many positions only (0 = all).
            cu_seq_lens_q: int32 [documents + 1], B = 1: where documents begin, with or without `position_ids`.
            seq_idx: int [B, T], a document's number for each of its tokens; says the same.
            row_blocks: int32 [B], the most blocks that a query of each row may read, where a step of up to 8 tokens follows cached ones; the
                budget's number is the most a row may have. A row with as many as it has blocks reads everything.
            kwargs: shift_labels, int [B, T], labels at the position that predicts them, as trainers give that shift before they cut
                rows; they are taken as they are, instead of `labels`. What collators and other releases hand over besides is ignored.

        Returns:
            `SSACausalLMOutput`. In training `loss` = CE + alpha * mean over layers of (sparsity + commitment loss), and `logits`
            is None beside labels: they are never held for all tokens. Without labels a loss of the logits trains the alignment, too
            (`ssa.model.alignment`).
        """
        # no argument by name: in whatever is called so `Trainer` sees labels that each batch must have
        shift_labels = kwargs.pop("shift_labels", None)
        refuse_typos(kwargs, SSAForCausalLM.forward)
        cache = one_cache(cache, past_key_values)
        steps = not (
            inputs_embeds is not None or observer or output_hidden_states or output_attentions or stream or use_cache is False
        )
        if steps and labels is None and shift_labels is None and cache is not None and not torch.is_grad_enabled():
            logits = self._decoded(input_ids, attention_mask, position_ids, cache, attention_mode, budget)
            if logits is not None:
                return SSACausalLMOutput(logits=logits, **{CACHE_FIELD: cache})
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None:
            position_ids = document_positions(position_ids, cu_seq_lens_q, seq_idx, tokens, cache)
        outputs: SSAModelOutput = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
            inputs_embeds=inputs_embeds, use_cache=use_cache, attention_mode=attention_mode, budget=budget, stream=stream,
            cu_seqlens=cu_seqlens, observer=observer, output_hidden_states=output_hidden_states, output_attentions=output_attentions,
            row_blocks=row_blocks, carry_alignment=labels is None and shift_labels is None, return_dict=True,
        )  # fmt: skip
        hidden_BTC = outputs.last_hidden_state
        result = SSACausalLMOutput(hidden_states=outputs.hidden_states, **{CACHE_FIELD: outputs.cache})
        if outputs.alignment is not None:
            result.sparsity_loss, result.commitment_loss = outputs.alignment.detach().unbind()
        targets = shift_labels
        if labels is not None and targets is None:
            targets = shifted_targets(labels, position_ids, attention_mask)
        if targets is not None:
            count = (targets != -100).sum()
            nll = self.summed_nll(hidden_BTC, targets)
            result.cross_entropy = nll.detach() / count.clamp(min=1)
            result.loss = nll / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
            counted = self.training and num_items_in_batch is not None and shift_labels is None
            if counted and labels is not None and not (labels.is_cuda and self.train_step.number):
                warn_of_counted_starts(labels, count)  # on a GPU in the first step alone: to look is to wait
            if outputs.alignment is not None:
                result.alignment = outputs.alignment
                weight = weight_in_loss(self.config.alignment_weight, self.train_step, count, num_items_in_batch)
                result.loss = result.loss + weight * outputs.alignment.sum()
            if outputs.selection_loss is not None:
                result.selection_loss = outputs.selection_loss
                weight = weight_in_loss(self.model.selector.loss_weight, self.train_step, count, num_items_in_batch)
                result.loss = result.loss + weight * outputs.selection_loss
        if targets is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            result.logits = self.lm_head(hidden_BTC[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else keep])
        return replace(result)  # in the order of the fields, loss and logits first, not in that of their making

    def _decoded(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, cache: BlockCache,
        attention_mode: AttentionMode | None, budget: Readings | None,
    ) -> Tensor | None:  # fmt: skip
        """The logits of a token after others on a GPU, by a captured step; None where the pass is no such step, or the first over its cache,
        which looks at the mask."""
        past = cache.get_seq_length()
        if input_ids is None or not input_ids.is_cuda or input_ids.shape[1] != 1 or not past or torch.compiler.is_compiling():
            return None
        if attention_mask is not None and attention_mask.shape != (len(input_ids), past + 1):
            return None
        if cache.step_inputs is None:
            ids_B1, starts_B = torch.empty_like(input_ids), torch.zeros_like(input_ids[:, 0])
            calls = self.model.decoding_calls(attention_mode, budget)
            if self.model.steps.applies(self, calls, self.model.embed_tokens.weight[:1, None], 1):
                cache.step_inputs = ids_B1, starts_B
            return None
        ids_B1, starts_B = cache.step_inputs
        if len(ids_B1) != len(input_ids):
            cache.step_inputs = None
            return None
        ids_B1.copy_(input_ids)
        if position_ids is not None:
            starts_B.copy_(past - position_ids[:, -1].expand(len(input_ids)))
        elif attention_mask is not None:
            starts_B.copy_((attention_mask == 0).sum(1))
        else:
            starts_B.zero_()
        calls = self.model.decoding_calls(attention_mode, budget)
        if not self.model.steps.applies(self, calls, self.model.embed_tokens.weight[:1, None], 1):
            return None
        return self.model.steps.run(self, ids_B1, cache, starts_B, calls).clone()

    def token_nll(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None, **kwargs) -> Tensor:
        """-log p(token t+1 | tokens <= t) in nats, fp32 [B, T-1]; 0 where there is no target (document starts, labels of -100).

        kwargs (attention_mode, budget, attention_mask, cu_seq_lens_q, seq_idx, observer) are those of `forward`.
        """
        cu_seq_lens_q, seq_idx = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("seq_idx", None)
        position_ids = document_positions(position_ids, cu_seq_lens_q, seq_idx, input_ids, None)
        kwargs |= {"use_cache": False, "return_dict": True}
        hidden_BTC = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs).last_hidden_state
        targets = shifted_targets(input_ids if labels is None else labels, position_ids, kwargs.get("attention_mask"))
        return self._nll(hidden_BTC[:, :-1], targets)

    def summed_nll(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """Sum over targets of -log p in nats, fp32 scalar. hidden [B, T, C]; targets int64 [B, T] or, where the last position has
        none, [B, T-1]; -100 = no target. Logits are never held for all tokens."""
        targets = torch.nn.functional.pad(targets_BT, (0, hidden_BTC.shape[1] - targets_BT.shape[1]), value=-100)
        if not _is_plain(self.lm_head):
            return self._nll(hidden_BTC, targets).sum()
        hidden = hidden_BTC.flatten(0, 1)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return linear_cross_entropy(hidden, self.lm_head.weight, targets.flatten(), impl=self.model.impl)

    def _nll(self, hidden_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """fp32 [B, T]; logits exist in fp32 for a slice of the tokens at a time."""
        hidden, targets = hidden_BTC.reshape(-1, hidden_BTC.shape[-1]), targets_BT.reshape(-1)
        step = max(1, SLICE_ELEMENTS.get(hidden.device.type, 1 << 24) // self.config.vocab_size)
        if len(hidden) <= step:
            return self._nll_slice(hidden, targets).view(targets_BT.shape)
        parts = [
            # the backward pass computes a slice's logits again
            checkpoint(self._nll_slice, hidden[i : i + step], targets[i : i + step], use_reentrant=False)
            for i in range(0, len(hidden), step)
        ]
        return torch.cat(parts).view(targets_BT.shape)

    def _nll_slice(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.lm_head(hidden).float(), targets, ignore_index=-100, reduction="none")


def _is_plain(head: nn.Module) -> bool:
    """A product with `head.weight` is all that `head` does: no adapter, quantization, hook or replaced forward has a say in it."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, Tensor, FakeTensor)  # the last while a graph is exported
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    )
