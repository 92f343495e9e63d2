"""SDT, Sparse Dynamic Transformer ("Subjective Depth Transformer", Wieser et al. 2025, arXiv 2511.21408).

Layers work in pairs (2j, 2j + 1). The decision layer 2j always runs: post = F_dec(x). A small prior network
predicts its update from x alone; how far the real update Δ = post − x surprises it gives the score of each
token. The dynamic layer 2j + 1 computes only the selected tokens: y = post + g·(F_dyn(post) − post).
The score depends on tokens up to t, so the `threshold` rule decodes exactly as it prefills.

The prior's loss is MSE(sg(x) + Δ̂, sg(post)). The paper does not say whether x carries a gradient there. It
must not: post moves with x, so the loss would push x along Δ without end. The language-model gradient still
reaches the prior and the decision layer through g.
"""

from torch import Tensor

from .classification import RoutedForSequenceClassification
from .configuration import Qwen2SDTConfig
from .language_model import RoutedForCausalLM
from .modeling import RoutedModel
from .routing import Block, Router, RoutingContext, routed_update, row_means
from .selection import RoutingResult
from .state import LayerState
from .surprise import PriorNetwork, SurpriseGate


class SDTRouter(Router):
    """Prior and surprise gate of one pair; sits at the dynamic layer."""

    def __init__(self, config: Qwen2SDTConfig):
        super().__init__(config)
        self.config: Qwen2SDTConfig = config
        self.prior = PriorNetwork(config)
        self.surprise = SurpriseGate(config)

    def forward(
        self,
        block: Block,
        hidden_states: Tensor,
        previous_hidden_states: Tensor,
        context: RoutingContext,
        state: LayerState,
    ) -> tuple[Tensor, RoutingResult]:
        """Hidden states (B, T, D) after the dynamic layer, and what it reports.

        Args:
            block: the dynamic layer.
            hidden_states: post, the decision layer's output, (B, T, D).
            previous_hidden_states: x, the decision layer's input, (B, T, D).
        """
        post, before = hidden_states, previous_hidden_states
        predicted = self.prior(before)
        update = post.float() - before.float()
        layer = block.layer
        score, gate = self.surprise(update, predicted, before, state.beta, context, layer)
        losses, quantiles = {}, None
        if self.training:
            selection, losses, quantiles = self.select_for_training(score, post, context, state)
            error = (predicted.float() - update.detach()).square().mean(-1)
            losses["prior"] = (self.config.prior_loss_weight, row_means(error, context.valid))
        else:
            selection = self.select(score, post, context, state)
        output = routed_update(block, post, selection, gate, context)
        return output, selection.result(score, gate, losses, quantiles=quantiles)


class Qwen2SDTModel(RoutedModel):
    """Qwen2 backbone with SDT pairs."""

    config: Qwen2SDTConfig
    router_class = SDTRouter


class Qwen2SDTForCausalLM(RoutedForCausalLM):
    """Sparse Dynamic Transformer language model."""

    config: Qwen2SDTConfig
    model_class = Qwen2SDTModel


class Qwen2SDTForSequenceClassification(RoutedForSequenceClassification):
    """Sparse Dynamic Transformer under a classifier of whole texts."""

    config: Qwen2SDTConfig
    model_class = Qwen2SDTModel
