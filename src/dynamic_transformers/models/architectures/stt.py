"""Sparse Transition Transformer, "Subjective Timescale Transformer" (Wieser et al. 2025, arXiv 2511.21408).

Its model: models/stt.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from dynamic_transformers.constraints import In, OneOf, Weight
from dynamic_transformers.models.architectures.accounts import FlopAccount, block_flops
from dynamic_transformers.models.architectures.surprise import SurpriseArchitecture

if TYPE_CHECKING:
    from dynamic_transformers.models.configuration import Qwen2STTConfig
    from dynamic_transformers.settings import ModelSettings


@dataclass
class STTSettings:
    """`model.stt`."""

    targets: Annotated[str, OneOf("topk", "threshold")] = "topk"
    target_threshold: Annotated[float, In("(0, 1)")] = 0.75  # of the gate
    train_output: Annotated[str, OneOf("sparse", "dense")] = "sparse"
    teacher_detach: bool = False
    student_weight: Weight = 0.01
    gate_mean_weight: Weight = 0.001  # only in threshold mode


class STT(SurpriseArchitecture):
    """A student learns from a dense teacher's surprise which tokens deserve the block."""

    name, title = "stt", "STT"
    description = (
        "Sparse Transition Transformer: a student predicts from two neighbouring tokens whether a layer is "
        "worth computing"
    )
    model_type, module, classes = "qwen2_stt", "stt", "Qwen2STT"
    predicts = True
    parts: ClassVar[dict[str, str]] = {"prior": "prior", "surprise": "surprise", "student": "predictor"}
    training_note = (
        "STT's training cost includes the dense teacher, so it sees fewer tokens for the same FLOPs"
    )

    def options(self, model: ModelSettings) -> dict[str, Any]:
        """Targets, teacher and student."""
        return super().options(model) | vars(model.stt)

    def check(self, model: ModelSettings) -> None:
        """The student is the predictor; a bound on the tokens of a row needs targets of a fixed number."""
        if model.predictor_weight:
            raise ValueError("model.predictor_weight: STT's student is its predictor; leave it at 0")
        bounded = (model.stt.targets, model.stt.train_output) == ("topk", "sparse")
        if model.training_rule == "threshold" and not bounded:
            raise ValueError(
                "model.training_rule=threshold needs model.stt.targets=topk and model.stt.train_output=sparse"
            )

    def why_not_compiled(self, model: ModelSettings) -> str:
        """With a threshold the number of targets is data."""
        if model.stt.targets != "threshold":
            return ""
        return "not with model.stt.targets=threshold, whose number of targets varies"

    def score_flops(self, config: Qwen2STTConfig, training: bool) -> FlopAccount:
        """The student, whose input is detached: its backward is the weights' gradient alone."""
        account = FlopAccount(student=(2 if training else 1) * 4.0 * config.hidden_size)
        if training:
            account["prior"] = self.prior_flops(config, training)
        return account

    def training_layer(self, config: Any, layer: int, length: float, fraction: float | None) -> FlopAccount:
        """With the dense teacher; without the sparse pass where the teacher's output is the layer's."""
        if fraction is None:
            return super().training_layer(config, layer, length, fraction)
        detached = config.teacher_detach and config.train_output == "sparse"
        account = FlopAccount(teacher=(1 if detached else 3) * block_flops(config, length).total())
        if config.train_output == "dense":
            account.add(self.router_flops(config, training=True))
        else:
            account.add(super().training_layer(config, layer, length, fraction))
        return account


ARCHITECTURE = STT()
