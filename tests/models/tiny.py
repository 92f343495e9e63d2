"""Tiny random models of each architecture, and ways to look into them."""

import torch
from transformers import PreTrainedModel

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.registration import register_models

register_models()  # for the tests of auto classes

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
# What a contract of every forward is tried on: each architecture, and the surprise gate at both ends of β.
STAGES = {architecture: (architecture, {}) for architecture in ALL} | {
    "sdt last beta": ("sdt", {"at_end": True}),
    "stt last beta": ("stt", {"at_end": True}),
}
ROUTED_STAGES = [stage for stage in STAGES if stage != "standard"]
# And each selection rule and option that changes the forward in eval mode.
CASES = STAGES | {
    "mod aux": ("mod", {"selection_rule": "aux", "aux_weight": 0.01}),
    "mod predictor": ("mod", {"selection_rule": "predictor", "predictor_weight": 0.01}),
    "mod calibrated": ("mod", {"selection_rule": "calibrated_predictor", "predictor_weight": 0.01}),
    "mod raw gate": ("mod", {"gate": "raw"}),
    "sdt predictor": ("sdt", {"selection_rule": "predictor", "predictor_weight": 0.01}),
    "sdt calibrated": ("sdt", {"selection_rule": "calibrated_predictor", "predictor_weight": 0.01}),
    "sdt window 5": ("sdt", {"surprise_window": 5}),
    "sdt window 1": ("sdt", {"surprise_window": 1}),
    "sdt moving average": ("sdt", {"surprise_normalize": "moving_average", "surprise_window": 7}),
    "sdt state": ("sdt", {"surprise_normalize": "state"}),
    "stt predictor": ("stt", {"selection_rule": "predictor"}),
    "stt threshold targets": ("stt", {"targets": "threshold"}),
    "mod even": ("mod", {"selection_rule": "even"}),
    "sdt even": ("sdt", {"selection_rule": "even"}),
    "stt even": ("stt", {"selection_rule": "even"}),
}


def tiny_model(
    architecture: str, seed: int = 0, attention: str = "sdpa", at_end: bool = False, **options
) -> PreTrainedModel:
    """A model in training mode, with weights large enough that layers matter and surprise differs.

    Args:
        at_end: its schedules (β) stand at the last step of a run, not at the first.
        options: of its configuration.
    """
    torch.manual_seed(seed)
    config_class, model_class = (
        ARCHITECTURES[architecture].config_class,
        ARCHITECTURES[architecture].model_class,
    )
    if architecture != "standard":
        options.setdefault("capacity", 0.5)
    config = config_class(**BACKBONE | options)
    config._attn_implementation = attention
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    if at_end:
        model.set_progress(999, 1000)
    return model.train()


def calibrated(architecture: str, steps: int = 5, **options) -> PreTrainedModel:
    """A model in eval mode whose thresholds have seen some training batches."""
    model = tiny_model(architecture, **options)
    for step in range(steps):
        model(input_ids=tokens(4, 32, seed=100 + step), use_cache=False)
        if architecture != "standard":
            model.advance()
    return model.eval()


def calibrated_case(case: str, **options) -> PreTrainedModel:
    """The calibrated model of one of `CASES`, with further options."""
    architecture, own = CASES[case]
    return calibrated(architecture, **own | options)


def tokens(rows: int, length: int, seed: int = 0, vocabulary: int = VOCAB) -> torch.Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits of an uncached forward; random routing draws the same noise each time."""
    torch.manual_seed(0)
    return model(input_ids=ids, use_cache=False, **inputs).logits
