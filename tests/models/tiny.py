"""Tiny random models of each architecture, and ways to look into them."""

import torch
from transformers import PreTrainedModel

from dynamic_transformers.models import MODEL_CLASSES

VOCAB = 97
ROUTED = ("mod", "sdt", "stt")
ALL = ("standard", *ROUTED)
BACKBONE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def tiny_model(architecture: str, seed: int = 0, attention: str = "sdpa", **options) -> PreTrainedModel:
    """A model in training mode, with weights large enough that layers matter."""
    torch.manual_seed(seed)
    config_class, model_class = MODEL_CLASSES[architecture]
    if architecture != "standard":
        options.setdefault("capacity", 0.5)
    config = config_class(**BACKBONE | options)
    config._attn_implementation = attention
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.train()


def calibrated(architecture: str, steps: int = 5, **options) -> PreTrainedModel:
    """A model in eval mode whose thresholds have seen some training batches."""
    model = tiny_model(architecture, **options)
    for step in range(steps):
        with torch.no_grad():
            model(input_ids=tokens(4, 32, seed=100 + step), use_cache=False)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits of an uncached forward."""
    return model(input_ids=ids, use_cache=False, **inputs).logits
