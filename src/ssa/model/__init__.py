"""The model. Importing this registers it: `AutoModelForCausalLM.from_pretrained(directory)` then knows `model_type: ssa`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ssa.model.cache import BlockCache
from ssa.model.configuration import SSAConfig
from ssa.model.modeling import SSACausalLMOutput, SSAForCausalLM, SSAModel, SSAPreTrainedModel

AutoConfig.register(SSAConfig.model_type, SSAConfig)
AutoModel.register(SSAConfig, SSAModel)
AutoModelForCausalLM.register(SSAConfig, SSAForCausalLM)

__all__ = ["BlockCache", "SSACausalLMOutput", "SSAConfig", "SSAForCausalLM", "SSAModel", "SSAPreTrainedModel"]
