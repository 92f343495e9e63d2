"""The routed models and their registration with transformers. The standard one is transformers' own Qwen2."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .configuration import Qwen2MoDConfig, Qwen2SDTConfig, Qwen2STTConfig, RoutedConfig
from .language_model import RoutedForCausalLM
from .mod import Qwen2MoDForCausalLM, Qwen2MoDForSequenceClassification, Qwen2MoDModel
from .sdt import Qwen2SDTForCausalLM, Qwen2SDTForSequenceClassification, Qwen2SDTModel
from .stt import Qwen2STTForCausalLM, Qwen2STTForSequenceClassification, Qwen2STTModel

MODEL_CLASSES = {
    "standard": (Qwen2Config, Qwen2ForCausalLM),
    "mod": (Qwen2MoDConfig, Qwen2MoDForCausalLM),
    "sdt": (Qwen2SDTConfig, Qwen2SDTForCausalLM),
    "stt": (Qwen2STTConfig, Qwen2STTForCausalLM),
}

for _config, _backbone, _language_model, _classifier in (
    (Qwen2MoDConfig, Qwen2MoDModel, Qwen2MoDForCausalLM, Qwen2MoDForSequenceClassification),
    (Qwen2SDTConfig, Qwen2SDTModel, Qwen2SDTForCausalLM, Qwen2SDTForSequenceClassification),
    (Qwen2STTConfig, Qwen2STTModel, Qwen2STTForCausalLM, Qwen2STTForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _backbone)
    AutoModelForCausalLM.register(_config, _language_model)
    AutoModelForSequenceClassification.register(_config, _classifier)

__all__ = ["MODEL_CLASSES", "RoutedConfig", "RoutedForCausalLM"]
