"""A routed backbone under a classifier of whole texts, or a regression: `score`, as Qwen2's is."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration import RoutedConfig
from .modeling import RoutedModelWithHead, combine_losses, row_shares
from .routing import row_means
from .selection import RoutingResult


@dataclass
class RoutedSequenceClassifierOutput(ModelOutput):
    """Output of the classifier.

    Attributes:
        loss: with labels; in training the classification loss plus the weighted auxiliary losses.
        logits: (B, classes).
        classification_loss: as Qwen2's, alone.
        hidden_states: as of the backbone.
        auxiliary_losses: name → mean over routed layers, not weighted; training only.
        routing: layer index → what the routed layer reports.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    classification_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    auxiliary_losses: dict[str, Tensor] | None = None
    routing: dict[int, RoutingResult] | None = None


class RoutedForSequenceClassification(RoutedModelWithHead):
    """Classifier of the last token, which alone has seen the whole text."""

    def __init__(self, config: RoutedConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = self.model_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> RoutedSequenceClassifierOutput:
        """Logits of each row and, with labels, the loss.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, output_hidden_states, output_attentions:
                as in `RoutedModel.forward`. Padding is told by `attention_mask`.
            labels: (B,) classes, (B, classes) of several at once, or numbers; `config.problem_type` as in
                Qwen2. -100 where one is not known.
            num_items_in_batch: labels of the whole optimizer step, over micro-batches and ranks. All losses
                are then this forward's share of the step's.

        Raises:
            ValueError: as in `RoutedModel.forward`, or several rows and nothing says which tokens pad.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        hidden_states = outputs.last_hidden_state
        last = last_tokens(input_ids, attention_mask, self.config.pad_token_id, hidden_states)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        logits = self.score(hidden_states[rows, last])
        loss = classification_loss = auxiliary = None
        if labels is not None:
            labels = labels.to(logits.device)
            known = (labels != -100).reshape(len(labels), -1)
            shares = row_shares(known, num_items_in_batch)
            losses = label_losses(logits.float(), labels, self.config).reshape(known.shape)
            classification_loss = (shares * row_means(losses, known)).sum()
            auxiliary, total = combine_losses(outputs.routing, shares)
            loss = classification_loss + total
        return RoutedSequenceClassifierOutput(
            loss=loss,
            logits=logits,
            classification_loss=classification_loss,
            hidden_states=outputs.hidden_states,
            auxiliary_losses=auxiliary,
            routing=outputs.routing,
        )


def label_losses(logits: Tensor, labels: Tensor, config: RoutedConfig) -> Tensor:
    """Loss of each label by the function that Qwen2 takes; finite where a label is not known.

    Raises:
        ValueError: `config.problem_type` is not one of transformers'.
    """
    kind = config.problem_type
    if kind is None and config.num_labels != 1:
        whole = labels.dtype in (torch.long, torch.int)
        kind = "single_label_classification" if whole else "multi_label_classification"
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.flatten().long(), reduction="none")
    logits, labels = logits.reshape(labels.shape), labels.float()
    if kind in (None, "regression"):
        return F.mse_loss(logits, labels, reduction="none")
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    raise ValueError(f"problem_type={kind!r}: give one of transformers', or None")


def last_tokens(
    input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None, hidden_states: Tensor
) -> Tensor:
    """Index of each row's last token that is not padding, (B,); as in Qwen2, and by the mask.

    Raises:
        ValueError: several rows, and nothing says which tokens pad.
    """
    batch, length, _ = hidden_states.shape
    device = hidden_states.device
    token = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        token &= attention_mask.to(device) != 0
    if input_ids is not None and pad_token_id is not None:
        token &= input_ids.to(device) != pad_token_id
    elif attention_mask is None and batch > 1:
        raise ValueError("give attention_mask, or set config.pad_token_id: which tokens pad is not known")
    return (token * torch.arange(length, device=device)).argmax(1)
