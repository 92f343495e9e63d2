"""Looped Qwen2, the baseline that reuses depth. Its model: models/looped.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dynamic_transformers.constraints import In
from dynamic_transformers.models.architectures.base import Architecture

if TYPE_CHECKING:
    from transformers import Qwen2Config

    from dynamic_transformers.settings import ModelSettings


@dataclass
class LoopedSettings:
    """`model.looped`."""

    passes: Annotated[int, In("[1, 64]")] = 2  # r, how often the middle layers run; 1: the standard model
    prelude: Annotated[int, In("[0, 1024]")] = 1  # layers before them, which run once
    coda: Annotated[int, In("[0, 1024]")] = 1  # and behind them


class Looped(Architecture):
    """The layers of a size, of which all but the first and last ones run r times."""

    name, title = "looped", "Looped"
    description = "a Qwen2 whose middle layers run several times, with the same weights"
    model_type, module, classes = "qwen2_looped", "looped", "Qwen2Looped"

    def options(self, model: ModelSettings) -> dict[str, Any]:
        """Passes, prelude and coda."""
        return vars(model.looped)

    def configuration(self, backbone: dict[str, Any], model: ModelSettings) -> Qwen2Config:
        """Of as many distinct layers as the backbone has.

        Raises:
            ValueError: none of them is left for the middle.
        """
        looped, distinct = model.looped, backbone["num_hidden_layers"]
        depth = distinct + (looped.passes - 1) * self.middle_layers(distinct, model)
        return super().configuration(backbone | {"num_hidden_layers": depth, "layer_types": None}, model)

    def check(self, model: ModelSettings) -> None:
        """Some layer must be left for the middle."""
        if model.pretrained is None:
            self.middle_layers(model.backbone.num_hidden_layers, model)

    @staticmethod
    def middle_layers(distinct: int, model: ModelSettings) -> int:
        """Layers that run `passes` times.

        Raises:
            ValueError: there are none.
        """
        prelude, coda = model.looped.prelude, model.looped.coda
        if distinct <= prelude + coda:
            raise ValueError(
                f"model.looped.prelude={prelude} and coda={coda} leave none of {distinct} layers to repeat"
            )
        return distinct - prelude - coda


ARCHITECTURE = Looped()
