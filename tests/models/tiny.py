"""Tiny random models of each architecture, and ways to look into them."""

from inspect import get_annotations

import torch
from transformers import PreTrainedModel

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.architectures.surprise import SurpriseArchitecture
from dynamic_transformers.models.registration import register_models

register_models()  # for the tests of auto classes

VOCAB = 97
ALL = tuple(ARCHITECTURES)
ROUTED = tuple(name for name, record in ARCHITECTURES.items() if record.routed)
DENSE = tuple(name for name in ALL if name not in ROUTED)
SURPRISE = tuple(name for name, record in ARCHITECTURES.items() if isinstance(record, SurpriseArchitecture))
# What a configuration needs for the rule `predictor`.
PREDICTOR = {
    name: {} if record.predicts else {"predictor_weight": 0.01}
    for name, record in ARCHITECTURES.items()
    if record.routed
}
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
    f"{architecture} last beta": (architecture, {"at_end": True}) for architecture in SURPRISE
}
ROUTED_STAGES = [stage for stage, (architecture, _) in STAGES.items() if architecture in ROUTED]
# The selection rules that every routed architecture has; one that predicts by its scores has no second τ.
RULES = (
    {f"{name} predictor": (name, {"selection_rule": "predictor", **own}) for name, own in PREDICTOR.items()}
    | {
        f"{name} calibrated": (name, {"selection_rule": "calibrated_predictor", **own})
        for name, own in PREDICTOR.items()
        if not ARCHITECTURES[name].predicts
    }
    | {f"{name} even": (name, {"selection_rule": "even"}) for name in ROUTED}
)
# And each option of one architecture that changes the forward in eval mode.
CASES = (
    STAGES
    | RULES
    | {
        "mod aux": ("mod", {"selection_rule": "aux", "aux_weight": 0.01}),
        "mod raw gate": ("mod", {"gate": "raw"}),
        "sdt window 5": ("sdt", {"surprise_window": 5}),
        "sdt window 1": ("sdt", {"surprise_window": 1}),
        "sdt moving average": ("sdt", {"surprise_normalize": "moving_average", "surprise_window": 7}),
        "sdt state": ("sdt", {"surprise_normalize": "state"}),
        "stt threshold targets": ("stt", {"targets": "threshold"}),
    }
)


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
    if architecture in ROUTED:
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
        if architecture in ROUTED:
            model.advance()
    return model.eval()


def calibrated_case(case: str, **options) -> PreTrainedModel:
    """The calibrated model of one of `CASES`, with further options."""
    architecture, own = CASES[case]
    return calibrated(architecture, **own | options)


def short_window(stage: str, window: int) -> dict[str, int]:
    """An option of one of `STAGES`: averages over fewer tokens than the rows have, where it has averages."""
    return {"surprise_window": window} if STAGES[stage][0] in SURPRISE else {}


def loss_weights(architecture: str) -> list[str]:
    """The options of a configuration that weigh an auxiliary loss, and that may be above 0."""
    options = {
        name for kind in ARCHITECTURES[architecture].config_class.__mro__ for name in get_annotations(kind)
    }
    weights = {name for name in options if name.endswith("_weight")}
    return sorted(weights - ({"predictor_weight"} if ARCHITECTURES[architecture].predicts else set()))


def tokens(rows: int, length: int, seed: int = 0, vocabulary: int = VOCAB) -> torch.Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs) -> torch.Tensor:
    """Logits of an uncached forward; random routing draws the same noise each time."""
    torch.manual_seed(0)
    return model(input_ids=ids, use_cache=False, **inputs).logits
