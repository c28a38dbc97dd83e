"""For tests of this library and of code built on it: oracles, tiny models, and the conformance of methods and selectors."""

from ssa.testing.conformance import check_method, check_selector
from ssa.testing.oracles import (
    RMS_RATIO,
    LargestTensor,
    assert_near_exact,
    assert_rounded,
    attend,
    attention_oracle,
    document_positions,
    poisoned_empty,
    random_qkv,
    readable_keys,
    rms_ratio,
    save_checkpoint,
    tiny_config,
    tiny_model,
)

__all__ = [
    "RMS_RATIO",
    "LargestTensor",
    "assert_near_exact",
    "assert_rounded",
    "attend",
    "attention_oracle",
    "check_method",
    "check_selector",
    "document_positions",
    "poisoned_empty",
    "random_qkv",
    "readable_keys",
    "rms_ratio",
    "save_checkpoint",
    "tiny_config",
    "tiny_model",
]
