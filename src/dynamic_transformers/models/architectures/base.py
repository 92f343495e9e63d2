"""What the rest of the program asks of an architecture, and the answers of one that routes nothing.

A record is imported by the settings: no torch and no transformers before its classes are asked for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from dynamic_transformers.models.architectures.accounts import FlopAccount, block_flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Config

    from dynamic_transformers.settings import ModelSettings

MODELS = "dynamic_transformers.models"


class Architecture:
    """One architecture.

    Attributes:
        name: as `model.type` and manifests have it.
        title: for people.
        description: one line.
        model_type: of its configuration.
        classes: what the names of its classes begin with: `Qwen2MoD`.
        module: file in models/ that holds them; '' where they are transformers' own.
        routed: whether some layers compute only some tokens.
        least_layers: that it needs.
        own_rules: selection rules that no other architecture has.
        predicts: whether `predictor` needs no predictor, since the scores themselves can be cut at 0.
        new_parts: what the names of its tensors begin with that a Qwen2 does not have.
        parts: part of a router → kind of its parameters, which decides their learning rate.
        settings: dataclass that `model.options` is checked by; None: there are none.
        training_note: what its training does beside the forward and backward of what it computes; ''.
    """

    name: str
    title: str
    description: str
    model_type: str
    classes: str
    module = ""
    routed = False
    least_layers = 1
    own_rules: tuple[str, ...] = ()
    predicts = False
    new_parts: tuple[str, ...] = ()
    parts: ClassVar[dict[str, str]] = {}
    settings: type | None = None
    training_note = ""

    @cached_property
    def code(self) -> ModuleType:
        """The file with its classes."""
        return importlib.import_module(f"{MODELS}.{self.module}" if self.module else "transformers")

    @cached_property
    def config_class(self) -> type[Qwen2Config]:
        """Its configuration."""
        return self.class_of("Config")

    @cached_property
    def model_class(self) -> type[PreTrainedModel]:
        """Its language model."""
        return self.class_of("ForCausalLM")

    def class_of(self, kind: str) -> Any:
        """`Config`, `Model`, `ForCausalLM` or `ForSequenceClassification`."""
        return getattr(self.code, f"{self.classes}{kind}")

    def options(self, model: ModelSettings) -> dict[str, Any]:
        """What its configuration has beyond Qwen2's."""
        return model.options if self.settings else {}

    def configuration(self, backbone: dict[str, Any], model: ModelSettings) -> Qwen2Config:
        """The configuration of a model.

        Args:
            backbone: what Qwen2's configuration has, of a size or of a pretrained model.
        """
        return self.config_class(**backbone | self.options(model))

    def check(self, model: ModelSettings) -> None:
        """Refuse settings that are each in their range and yet cannot be meant for it.

        Raises:
            ValueError: names them, and what would be right.
        """

    def learned_weights(self, model: ModelSettings) -> dict[str, float | None]:
        """Setting → weight of what its routers learn selection by, beside the predictor."""
        return {}

    def why_not_compiled(self, model: ModelSettings) -> str:
        """Why its training forward is no single graph with these settings; ''."""
        return ""

    def parameter_kind(self, name: str) -> str:
        """`base`, or the kind of a router's part, from a parameter's name in the model."""
        if ".routers." not in name:
            return "base"
        return self.parts[name.split(".routers.")[1].split(".")[1]]

    def forward_layer(
        self,
        config: Qwen2Config,
        layer: int,
        length: float,
        fraction: float | None,
        keys: float | None = None,
    ) -> FlopAccount:
        """FLOPs per token of one layer in eval mode.

        Args:
            length: T, tokens of a row.
            fraction: of the tokens that a routed layer computes; None: it is a dense one.
            keys: as in `block_flops`.
        """
        return block_flops(config, length, 1.0 if fraction is None else fraction, keys)

    def training_layer(
        self, config: Qwen2Config, layer: int, length: float, fraction: float | None
    ) -> FlopAccount:
        """FLOPs per token of one layer's forward and backward, which costs twice its forward."""
        account = FlopAccount()
        account.add(block_flops(config, length, 1.0 if fraction is None else fraction), 3)
        return account


class RoutedArchitecture(Architecture, ABC):
    """One whose odd layers compute only selected tokens."""

    routed = True
    least_layers = 2
    new_parts = ("model.routers.", "model.routing_state.")

    def options(self, model: ModelSettings) -> dict[str, Any]:
        """Capacity, selection and training rule, predictor."""
        options: dict[str, Any] = super().options(model) | {
            "predictor_weight": model.predictor_weight,
            "capacity_warmup_steps": model.capacity_warmup_steps,
            "training_rule": model.training_rule,
            "training_rule_warmup": model.training_rule_warmup,
            "training_rule_bound": model.training_rule_bound,
        }
        if model.capacity is not None:
            options["capacity"] = model.capacity
        if model.selection_rule is not None:
            options["selection_rule"] = model.selection_rule
        return options

    @abstractmethod
    def score_flops(self, config: Any, training: bool) -> FlopAccount:
        """FLOPs per token of a routed layer's scores; with `training` forward and backward."""

    def router_flops(self, config: Any, training: bool) -> FlopAccount:
        """FLOPs per token of all that a routed layer adds to its block."""
        account = self.score_flops(config, training)
        if config.predictor_weight:
            up, down = 2.0 * config.hidden_size * (config.hidden_size // 2), 2.0 * (config.hidden_size // 2)
            if training:  # its input is detached
                account["predictor"] = 2 * up + 3 * down
            elif "predictor" in config.selection_rule:
                account["predictor"] = up + down
        return account

    def forward_layer(
        self,
        config: Qwen2Config,
        layer: int,
        length: float,
        fraction: float | None,
        keys: float | None = None,
    ) -> FlopAccount:
        """Its block's, and in a routed layer the router's."""
        account = super().forward_layer(config, layer, length, fraction, keys)
        if fraction is not None:
            account.add(self.router_flops(config, training=False))
        return account

    def training_layer(
        self, config: Qwen2Config, layer: int, length: float, fraction: float | None
    ) -> FlopAccount:
        """Its block's, and in a routed layer the router's."""
        account = super().training_layer(config, layer, length, fraction)
        if fraction is not None:
            account.add(self.router_flops(config, training=True))
        return account
