"""STT, Sparse Transition Transformer ("Subjective Timescale Transformer", arXiv 2511.21408).

Odd layers are routed. In training the teacher runs the block on every token, y = F(x), and predicts each
update from the previous token's output, Δ̂_t = SwiGLU(RMSNorm(y_{t−1})); surprise about Δ = y − x says which
tokens deserve the block. A linear student learns to say so from x_t and x_{t−1} alone. The layer's output is
a second, sparse pass of the same block over the selected tokens, as inference will compute it.

At inference the teacher does not run, so its gate g is not available and σ(student) is the gate. Training
multiplies with the same number: the forward value of the gate is σ(student), and its gradient is that of
the teacher's g (straight-through: g + sg(σ(student) − g)). The student itself learns from its
cross-entropy alone, and the two modes give the same output for the same selection.

Training costs more than a dense model; savings exist at inference only.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .classification import RoutedForSequenceClassification
from .configuration import Qwen2STTConfig
from .heads import PairScoreHead
from .language_model import RoutedForCausalLM
from .modeling import RoutedModel
from .routing import (
    Block,
    Router,
    RoutingContext,
    membership_loss,
    previous_token,
    routed_update,
    row_means,
)
from .selection import RoutingResult, Selection, score_quantile, select_mask, select_top_k
from .state import LayerState
from .surprise import PriorNetwork, SurpriseGate


class STTRouter(Router):
    """Teacher's transition network and surprise gate, and the student, of one layer."""

    def __init__(self, config: Qwen2STTConfig):
        if config.predictor_weight:
            raise ValueError("predictor_weight: STT's student is its predictor; leave it at 0")
        bounded = config.targets == "topk" and config.train_output == "sparse"
        if config.training_rule == "threshold" and not bounded:
            raise ValueError("training_rule='threshold' needs targets='topk' and train_output='sparse'")
        super().__init__(config)
        self.config: Qwen2STTConfig = config
        self.prior = PriorNetwork(config)
        self.surprise = SurpriseGate(config)
        self.student = PairScoreHead(2 * config.hidden_size)
        if config.train_output == "dense" and config.targets == "topk":
            # Nothing depends on the gate's value then, and data-parallel training wants a gradient for all.
            self.surprise.requires_grad_(False)

    def forward(
        self,
        block: Block,
        hidden_states: Tensor,
        previous_hidden_states: Tensor,
        context: RoutingContext,
        state: LayerState,
    ) -> tuple[Tensor, RoutingResult]:
        """Hidden states (B, T, D) after the routed layer, and what it reports."""
        logits = self.student_logits(hidden_states.detach(), context, block.layer)
        if self.training:
            return self.forward_training(block, hidden_states, logits, context, state)
        selection = self.select(logits, hidden_states, context, state)
        gate = torch.sigmoid(logits)
        output = routed_update(block, hidden_states, selection, gate, context)
        return output, selection.result(logits, gate)

    def forward_training(
        self,
        block: Block,
        hidden_states: Tensor,
        logits: Tensor,
        context: RoutingContext,
        state: LayerState,
    ) -> tuple[Tensor, RoutingResult]:
        """Teacher's dense pass, targets, losses, and the sparse pass.

        The student always learns the teacher's targets. The sparse pass computes them, unless what selects in
        evaluation does so in training: the student's logits above τ, or a control.
        """
        valid = context.valid
        detached = self.config.teacher_detach
        no_graph = detached and self.config.train_output == "sparse"
        with torch.no_grad() if no_graph else contextlib.nullcontext():
            dense = block(
                hidden_states,
                attention_mask=context.attention_mask,
                position_ids=context.position_ids,
                position_embeddings=context.position_embeddings,
            )
        teacher, before = (dense.detach(), hidden_states.detach()) if detached else (dense, hidden_states)
        predicted = self.prior(previous_token(teacher, context.document_starts(teacher.shape[1])))
        update = teacher.float() - before.float()
        layer = block.layer
        score, gate = self.surprise(update, predicted, before, state.beta, context, layer)
        targets = self.targets(score, gate, state.training_capacity, valid)
        selection = self.training_selection(logits, context, state, best=targets)
        quantile = score_quantile(logits, mean_fraction(targets.mask, valid), valid)
        error = (predicted.float() - update.detach()).square().mean(-1)
        losses = {
            "prior": (self.config.prior_loss_weight, row_means(error, valid)),
            "student": (self.config.student_weight, membership_loss(logits, targets, valid)),
        }
        if self.config.targets == "threshold":
            losses["gate_mean"] = (self.config.gate_mean_weight, row_means(gate, valid))
        # The number that the update is multiplied with is σ(student); its gradient is the teacher's.
        student_gate = gate + (torch.sigmoid(logits) - gate).detach()
        quantiles = torch.stack([quantile, torch.full_like(quantile, torch.nan)])
        result = selection.result(logits, student_gate, losses, surprise_gate=gate, quantiles=quantiles)
        if self.config.train_output == "dense":
            return dense, result
        return routed_update(block, hidden_states, selection, student_gate, context), result

    def student_logits(self, hidden_states: Tensor, context: RoutingContext, layer: int) -> Tensor:
        """Logits (B, T) in fp32 of w·[x_t ‖ x_{t−1}], for (B, T, D), each half RMS-normalised.

        The half that looks back is taken of each token first and then moved on by one: that is the same, and
        what the cache must keep of a token is one number.
        """
        size = self.config.hidden_size
        normed = F.rms_norm(hidden_states.float(), (size,), eps=self.config.rms_norm_eps)
        now, back = self.student(normed)
        history = context.with_history(back, layer, 1)
        previous = previous_token(history, context.document_starts(history.shape[1]))
        return now + previous[:, -now.shape[1] :]

    def targets(self, score: Tensor, gate: Tensor, capacity: float, valid: Tensor | None) -> Selection:
        """Tokens that the teacher would compute: the γ most surprising, or all with g high enough."""
        if self.config.targets == "topk":
            return select_top_k(score.detach(), capacity, valid)
        # Each row's most surprising token is always one: a block without any token would have no gradient.
        score = score.detach() if valid is None else score.detach().masked_fill(~valid, -torch.inf)
        mask = (gate >= self.config.target_threshold) | (score == score.amax(1, keepdim=True))
        return select_mask(mask if valid is None else mask & valid)


def mean_fraction(mask: Tensor, valid: Tensor | None) -> Tensor:
    """Share of the valid tokens that are selected; 0 where there are none."""
    return mask.double().mean() if valid is None else mask.sum() / valid.sum().clamp(min=1).double()


class Qwen2STTModel(RoutedModel):
    """Qwen2 backbone with STT layers."""

    config: Qwen2STTConfig
    router_class = STTRouter


class Qwen2STTForCausalLM(RoutedForCausalLM):
    """Sparse Transition Transformer language model."""

    config: Qwen2STTConfig
    model_class = Qwen2STTModel


class Qwen2STTForSequenceClassification(RoutedForSequenceClassification):
    """Sparse Transition Transformer under a classifier of whole texts."""

    config: Qwen2STTConfig
    model_class = Qwen2STTModel
