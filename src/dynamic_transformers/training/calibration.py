"""Thresholds set by what evaluation sees: the last thing that a run does.

A moving average over training steps has seen top-k decide in the layers below, which evaluation does not
know; deeper layers then miss γ by 5 points and more. Text that is neither trained nor tested on says where
the quantile of evaluation lies. A few documents are too few: they differ in how they are scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import Qwen2Config

from dynamic_transformers.data.blocks import Blocks
from dynamic_transformers.models.configuration import RoutedConfig
from dynamic_transformers.models.language_model import RoutedForCausalLM
from dynamic_transformers.models.modeling import RoutedModel
from dynamic_transformers.models.routing import Block, Router, RoutingContext
from dynamic_transformers.models.selection import RoutingResult, score_quantile
from dynamic_transformers.models.state import KINDS, LayerState
from dynamic_transformers.training.flops import calibration_flops, target_fraction
from dynamic_transformers.training.heldout import fixed_randomness

Batches = Iterable[dict[str, Tensor]]

# Tokens of a run's calibration: what fewer and more give is told in docs/architectures.md.
CALIBRATION_TOKENS = 32768


def is_calibrated(config: Qwen2Config) -> bool:
    """Whether a model has thresholds that are meant to select a fraction γ of all tokens.

    Not the standard model, another selection rule, or STT with `targets: threshold`, where a gate decides.
    """
    routed = bool(getattr(config, "routed_layers", None))
    return routed and config.selection_rule in KINDS and target_fraction(config) is not None


def calibration_rows(split: Blocks, block_size: int) -> Blocks:
    """`CALIBRATION_TOKENS` of a split in whole blocks, evenly spaced over it; all of one that is smaller."""
    count = min(len(split), max(1, CALIBRATION_TOKENS // block_size))
    return split.select([place * len(split) // count for place in range(count)])


def calibration_cost(
    config: Qwen2Config,
    rows: Blocks,
    block_size: int,
    fractions: dict[int, float] | None = None,
    keys: dict[int, float] | None = None,
) -> float:
    """FLOPs of calibrating a model by these rows, of `block_size` tokens each; 0 where nothing is calibrated.

    Args:
        fractions, keys: as `calibrate` returns them; None: γ, and all rows alike.
    """
    if not isinstance(config, RoutedConfig) or not is_calibrated(config):
        return 0.0
    return len(rows) * block_size * calibration_flops(config, block_size, fractions, keys).total()


@torch.no_grad()
def calibrate(model: RoutedForCausalLM, batches: Batches) -> tuple[dict[int, float], dict[int, float]]:
    """Make the threshold of the model's selection rule, if it has one, select the fraction γ of these tokens.

    Layer by layer from the first, all batches together, since a layer's scores depend on what the layers
    below select: each layer runs once for each token. In the precision of the weights, which a run and the
    command `calibrate` keep in fp32. Evaluation of a bf16 run has bf16 weights by default, and then misses γ
    by a few tenths of a point (docs/architectures.md). Nothing is done where `is_calibrated` says no.

    Args:
        model: in eval mode afterwards.
        batches: `input_ids` and `position_ids`, (B, T) each. The hidden states of all of them are kept: some
            ten thousand tokens are enough. With several ranks, all of them on every rank.

    Returns:
        Two dictionaries by routed layer: the fraction of the tokens that it selects by its new threshold (at
        γ = 1 all), and with how many tokens of its row a selected one is compared, on average over selected
        tokens.
    """
    model.eval()
    config, backbone = model.config, model.model
    if not is_calibrated(config):
        return {}, {}
    rule, fractions, keys = config.selection_rule, {}, {}
    with fixed_randomness(model.device):
        texts = [Text.of(backbone, batch) for batch in batches]
        for layer in range(config.routed_layers[-1] + 1):
            if layer in config.routed_layers:
                scores = [text.scores(layer) for text in texts]
                together = torch.cat([each.flatten() for each in scores])
                threshold = score_quantile(together, config.capacity, None)
                model.routing_state.set_threshold(rule, len(fractions), threshold)
                router = cast(Router, backbone.routers[str(layer)])
                of_rows = [router.above_threshold(each, threshold).sum(1) for each in scores]
                selected = torch.cat(of_rows).double()
                total = selected.sum()
                fractions[layer] = (total / together.numel()).item()
                keys[layer] = (selected.square().sum() / total.clamp(min=1)).item()
            if layer < config.routed_layers[-1]:
                for text in texts:
                    text.run(layer)
    return fractions, keys


@dataclass
class Text:
    """A batch on its way through the layers.

    Attributes:
        hidden_states: the next layer's input, (B, T, D).
        previous: the input of the layer before, (B, T, D).
    """

    backbone: RoutedModel
    context: RoutingContext
    hidden_states: Tensor
    previous: Tensor

    @classmethod
    def of(cls, backbone: RoutedModel, batch: dict[str, Tensor]) -> Text:
        """In front of the first layer."""
        device = backbone.device
        hidden_states = backbone.embed_tokens(batch["input_ids"].to(device))
        context = backbone.routing_context(hidden_states, None, batch["position_ids"].to(device), None)
        return cls(backbone, context, hidden_states, hidden_states)

    def scores(self, layer: int) -> Tensor:
        """What the rule of a routed layer compares with its threshold, (B, T); the block does not run."""
        if self.backbone.config.selection_rule == "calibrated_predictor":
            predictor = cast(Router, self.backbone.routers[str(layer)]).predictor
            assert predictor is not None
            return predictor(self.hidden_states)
        state = self.states()[layer]
        nothing = dataclasses.replace(state, threshold=torch.full_like(state.threshold, torch.inf))
        _, result = self.pass_through(Idle(layer), nothing)
        assert result is not None
        return result.score

    def run(self, layer: int) -> None:
        """Go through a layer, as in the backbone's own forward."""
        block = Block(self.backbone.layers[layer], layer)
        output, _ = self.pass_through(block, self.states().get(layer))
        self.hidden_states, self.previous = output, self.hidden_states

    def states(self) -> dict[int, LayerState]:
        """What each routed layer reads now."""
        layers = self.backbone.config.routed_layers
        return dict(zip(layers, self.backbone.routing_state(self.hidden_states), strict=True))

    def pass_through(self, block: Block, state: LayerState | None) -> tuple[Tensor, RoutingResult | None]:
        """Output of a layer with that block, and what it reports."""
        return self.backbone.run_layer(block, self.hidden_states, self.previous, self.context, state)


class Idle(Block):
    """A block that gives back what it gets: at full capacity, a router runs its block whatever τ is."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(self, hidden_states: Tensor, **options) -> Tensor:
        """(B, T, D), as given."""
        return hidden_states
