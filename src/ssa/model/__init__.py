"""The model. Importing this registers it: `AutoModelForCausalLM.from_pretrained(directory)` then knows `model_type: ssa`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ssa.model.cache import BlockCache
from ssa.model.configuration import SSAConfig
from ssa.model.modeling import SSACausalLMOutput, SSAForCausalLM, SSAModel, SSAPreTrainedModel

AutoConfig.register(SSAConfig.model_type, SSAConfig)
AutoModel.register(SSAConfig, SSAModel)
AutoModelForCausalLM.register(SSAConfig, SSAForCausalLM)
# by its name alone `Trainer` knows that label smoothing has to shift the labels, and a pipeline that the model generates
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SSAConfig.model_type] = SSAForCausalLM.__name__

__all__ = ["BlockCache", "SSACausalLMOutput", "SSAConfig", "SSAForCausalLM", "SSAModel", "SSAPreTrainedModel"]
