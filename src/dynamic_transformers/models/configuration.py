"""Configurations of the routed models: Qwen2's own, plus what routing needs."""

from typing import ClassVar

from transformers import Qwen2Config
from transformers.generation.utils import ALL_CACHE_NAMES
from transformers.utils.versions import require_version

# What an exported model's files were tried with; they load this file first.
require_version("transformers>=5.13,<6")
# Of a cache among arguments and outputs: `past_key_values`, `cache` from transformers 5.24 on.
CACHE_NAME = ALL_CACHE_NAMES[0]

CONTROLS = ("random", "even")  # selection rules that nothing was learned for


class RoutedConfig(Qwen2Config):
    """What MoD, SDT and STT share.

    Attributes:
        capacity: fraction γ of a row's tokens that a routed layer computes, in (0, 1].
        capacity_warmup_steps: steps over which the training capacity falls from 1 to `capacity`.
        selection_rule: who decides in eval mode: `threshold` (score > τ), `predictor` (logit > 0),
            `calibrated_predictor` (logit > its own τ), `aux` (router logit > 0; MoD only), or `topk`, which
            looks at the future and is therefore only an upper bound (docs/architectures.md). Two more
            are controls, which select in training too: `random` (each token with probability γ) and `even`
            (evenly spaced tokens of each document).
        training_rule: who selects in training: `topk`, or `threshold`, by which evaluation selects, too.
        training_rule_warmup: fraction of the schedule's steps that `topk` begins with.
        training_rule_bound: most tokens that `threshold` computes of a training row ÷ those of its capacity.
        predictor_weight: weight of the loss of a predictor of what training selects; 0: there is none.
    """

    # Of the outputs, for `Trainer`: evaluation gathers the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values", "cache", "hidden_states", "language_model_loss", "classification_loss",
        "auxiliary_losses", "routing",
    ]  # fmt: skip

    capacity: float = 0.5
    capacity_warmup_steps: int = 0
    selection_rule: str = "threshold"
    training_rule: str = "topk"
    training_rule_warmup: float = 0.1
    training_rule_bound: float = 1.5
    predictor_weight: float = 0.0

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the routed layers: the odd ones. With an odd depth the last layer stays standard."""
        return list(range(1, self.num_hidden_layers, 2))

    @property
    def target_fraction(self) -> float | None:
        """Fraction of tokens that a routed layer is meant to compute; None where only a gate decides."""
        return self.capacity

    @property
    def training_fraction(self) -> float:
        """Places that a routed layer computes in training ÷ all tokens, once warm-ups are over."""
        by_threshold = self.training_rule == "threshold"
        return min(1.0, self.training_rule_bound * self.capacity) if by_threshold else self.capacity

    @property
    def available_rules(self) -> list[str]:
        """Selection rules that a model of this configuration can follow: a control that one alone."""
        return [self.selection_rule] if self.selection_rule in CONTROLS else self.learned_rules

    @property
    def learned_rules(self) -> list[str]:
        """Selection rules that training prepares the model for."""
        predictor = ["predictor", "calibrated_predictor"] if self.predictor_weight else []
        return ["threshold", *predictor, "topk"]


class Qwen2MoDConfig(RoutedConfig):
    """Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

    Attributes:
        gate: `sigmoid` (g = σ(r)) or `raw` (g = r, the paper's equation 1).
        aux_weight: weight of the router's own membership loss, its logits against what training selects.
        z_loss_weight: weight of mean(r²).
    """

    model_type = "qwen2_mod"

    capacity: float = 0.125
    gate: str = "sigmoid"
    aux_weight: float = 0.0
    z_loss_weight: float = 0.0

    @property
    def learned_rules(self) -> list[str]:
        """`aux` too, where its loss has trained the router's logits to be cut at 0."""
        return [*super().learned_rules, *(["aux"] if self.aux_weight else [])]


class SurpriseConfig(RoutedConfig):
    """What SDT and STT share: the surprise gate and the network that predicts an update.

    Attributes:
        offset_ce_init: o_ce at the start, positive.
        multiplier_cu_init: m_cu at the start, positive.
        surprise_window: W, tokens of the moving average.
        beta_start, beta_end, beta_warmup_steps, beta_schedule: β over training (`linear` or `cosine`).
        surprise_normalize: `none`, `moving_average` (D / MA_W) or `state` (D·d / ‖x‖²).
        prior_factor: f; the network's width is max(2, ⌈f·d⌉ rounded up to even).
        prior_loss_weight: weight of the network's regression loss.
    """

    offset_ce_init: float = 1.025
    multiplier_cu_init: float = 1.1
    surprise_window: int = 100
    beta_start: float = 0.1
    beta_end: float = 100.0
    beta_warmup_steps: int = 100
    beta_schedule: str = "linear"
    surprise_normalize: str = "none"
    prior_factor: float = 0.0625
    prior_loss_weight: float = 0.05


class Qwen2SDTConfig(SurpriseConfig):
    """Sparse Dynamic Transformer (Wieser et al. 2025, arXiv 2511.21408)."""

    model_type = "qwen2_sdt"


class Qwen2STTConfig(SurpriseConfig):
    """Sparse Transition Transformer (Wieser et al. 2025, arXiv 2511.21408).

    Attributes:
        targets: `topk` (the γ most surprising tokens) or `threshold` (g ≥ `target_threshold`).
        target_threshold: least gate of a target in threshold mode.
        train_output: `sparse` (what inference computes) or `dense` (the teacher's output).
        teacher_detach: keep the language-model gradient out of the teacher's pass.
        student_weight: weight of the student's binary cross-entropy.
        gate_mean_weight: λ, weight of mean(g) in threshold mode.
    """

    model_type = "qwen2_stt"

    targets: str = "topk"
    target_threshold: float = 0.75
    train_output: str = "sparse"
    teacher_detach: bool = False
    student_weight: float = 0.01
    gate_mean_weight: float = 0.001

    @property
    def target_fraction(self) -> float | None:
        """γ where the most surprising tokens are the targets, or a control selects."""
        return self.capacity if self.targets == "topk" or self.selection_rule in CONTROLS else None

    @property
    def learned_rules(self) -> list[str]:
        """`predictor` cuts the student's logits at 0: the student is the predictor."""
        return ["threshold", "predictor", "topk"]


RoutedConfig.register_for_auto_class()
