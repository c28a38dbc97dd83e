"""What a saved model says for itself: README.md for people, and modeling_ssa.py for processes that have not imported this package.

transformers has no entry points for other people's models: a process that has not imported `ssa.model` knows a model of ours only by the
`auto_map` in its config.json, which points at modeling_ssa.py, and runs that file only where its user passes `trust_remote_code=True`.
Nothing here ever does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

AUTO_MAP = {
    "AutoConfig": "modeling_ssa.SSAConfig",
    "AutoModel": "modeling_ssa.SSAModel",
    "AutoModelForCausalLM": "modeling_ssa.SSAForCausalLM",
}
"""For config.json: class of transformers -> ours, as `STUB` has it."""

STUB = """\
# The model's code is the installed package; this file only imports it.
try:
    from ssa.model import SSAConfig, SSAForCausalLM, SSAModel  # noqa: F401
except ImportError as error:
    raise ImportError("this model needs its package: pip install sparse-sparse-attention") from error
"""

CARD = "README.md"
_MARK = "<!-- Written when the model was saved, and anew at the next save; without this line it stays as you leave it. -->"


def write_card(directory: Path, config: Any, figures: Mapping[str, str] | None = None) -> None:
    """Put README.md and modeling_ssa.py into `directory`. A README.md that is not of this function's making stays.

    Args:
        config: The model's, an `SSAConfig`.
        figures: What is known of its training, name -> value, as rows of the card's table.
    """
    (directory / "modeling_ssa.py").write_text(STUB, encoding="utf-8")
    if not is_foreign(directory / CARD):
        (directory / CARD).write_text(_text(config, figures or {}), encoding="utf-8")


def is_foreign(card: Path) -> bool:
    """Whether there is a card that somebody else wrote, or made their own."""
    return card.exists() and _MARK.encode() not in card.read_bytes()


def _text(config: Any, figures: Mapping[str, str]) -> str:
    budget = config.uniform_budget
    reads = f"`{budget}`: sparse attention reads {budget.num_selected_blocks} blocks of {budget.block_size} keys for each token"
    if config.layer_budgets:
        reads = f"`{config.budget}`: sparse attention reads, by layer, {', '.join(config.layer_budgets)} (blocks x keys) for each token"
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim}"
    rows = {
        "method": f"`{config.attention_name}`, trained with {config.attends.trained_with}",
        "budget": reads,
        "reads, unless told otherwise": "everything" if config.attention_mode == "full" else "the budget",
        "shape": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {heads}, vocabulary {config.vocab_size:,}",
        "positions": f"{config.max_position_embeddings:,}",
        **figures,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    asked = "" if config.layer_budgets else f', budget="{budget}"'
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- sparse-attention
- ssa
---
{_MARK}

# A language model with block-sparse attention

| | |
|---|---|
{table}

## Load

```
pip install sparse-sparse-attention
```

```python
import ssa.model  # makes the model known to transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS DIRECTORY")
model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=50, attention_mode="sparse"{asked})
```

`attention_mode` ("sparse" or "full") and `budget` can be chosen at each call.

Without the first import transformers says that this model "contains custom code": import `ssa.model`, or pass `trust_remote_code=True`, which runs
`modeling_ssa.py` here. That file imports the installed package and does nothing else.
"""
