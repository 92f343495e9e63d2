"""The routed models and their registration with transformers. The standard one is transformers' own Qwen2."""

from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from .configuration import Qwen2MoDConfig, Qwen2SDTConfig, Qwen2STTConfig, RoutedConfig
from .mod import Qwen2MoDForCausalLM
from .modeling import RoutedForCausalLM
from .sdt import Qwen2SDTForCausalLM
from .stt import Qwen2STTForCausalLM

MODEL_CLASSES = {
    "standard": (Qwen2Config, Qwen2ForCausalLM),
    "mod": (Qwen2MoDConfig, Qwen2MoDForCausalLM),
    "sdt": (Qwen2SDTConfig, Qwen2SDTForCausalLM),
    "stt": (Qwen2STTConfig, Qwen2STTForCausalLM),
}

for _config_class, _model_class in MODEL_CLASSES.values():
    if _config_class is not Qwen2Config:
        AutoConfig.register(_config_class.model_type, _config_class)
        AutoModelForCausalLM.register(_config_class, _model_class)

__all__ = ["MODEL_CLASSES", "RoutedConfig", "RoutedForCausalLM"]
