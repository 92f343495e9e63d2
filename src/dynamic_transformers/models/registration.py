"""The routed models, made known to transformers' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from dynamic_transformers.models.architectures import ARCHITECTURES

HEADS = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
}

for _record in ARCHITECTURES.values():
    if _record.routed:
        AutoConfig.register(_record.model_type, _record.config_class)
        for _kind, _auto_class in HEADS.items():
            _auto_class.register(_record.config_class, _record.class_of(_kind))
