"""RoPE scaling of a loaded model, to read contexts longer than it was trained on."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ssa.config import read_recipe
from ssa.errors import UserError
from ssa.eval.model_under_test import ModelUnderTest
from ssa.model import SSAForCausalLM


def scale_rope(model: SSAForCausalLM, factor: float, original: int | None = None) -> None:
    """Give `model`, in place, Llama-3 RoPE scaling by `factor` (the paper's Table A1 has 4 from 8192) and so many times its positions.

    Low frequencies turn `factor` times slower, those with wavelengths below a quarter of `original` are kept, as in recipes with
    `model.rope_factor`.

    Args:
        factor: 1 = unscaled RoPE.
        original: Positions that the model was trained on; by default what its own scaling says, else `max_position_embeddings`.

    Raises:
        UserError: A factor below 1, or a model whose RoPE is scaled by another rule already.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise UserError(f"rope_factor = {factor} must be at least 1")
    config = model.config
    now = dict(config.rope_parameters)
    kind = now.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise UserError(f"rope_factor = {factor}: the model's RoPE is already scaled by {kind!r}")
    if original is None:
        original = int(now.get("original_max_position_embeddings") or config.max_position_embeddings)
    if original < 1:
        raise UserError(f"rope_original_max_position = {original} must be at least 1")
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": now["rope_theta"]}
    if factor > 1:
        rope |= {
            "rope_type": "llama3", "factor": float(factor), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
    config.rope_parameters = rope
    config.max_position_embeddings = math.ceil(config.max_position_embeddings * factor / now.get("factor", 1.0))
    # the tables are fp32 buffers that no checkpoint holds
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)


def scaled(subject: ModelUnderTest, factor: float) -> ModelUnderTest:
    """`subject` after `scale_rope`, known by another hash: results with and without scaling are kept apart.

    A model whose RoPE is not scaled yet is taken to be trained on its run's context.
    """
    scaled_already = subject.model.config.rope_parameters.get("rope_type", "default") != "default"
    original = None
    if subject.run is not None and not scaled_already:
        recipe = subject.run / "recipe.json"
        original = read_recipe(recipe.read_text(encoding="utf-8"), str(recipe)).data.context
    scale_rope(subject.model, factor, original)
    rope = json.dumps(subject.model.config.rope_parameters, sort_keys=True)
    return replace(subject, sha256=hashlib.sha256((subject.sha256 + rope).encode()).hexdigest())
