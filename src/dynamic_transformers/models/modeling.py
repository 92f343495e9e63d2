"""Backbone and language-model head of the routed models.

The backbone is transformers' Qwen2: every tensor keeps Qwen2's name, so a pretrained checkpoint maps one to
one. What is new lies under `model.routers`, one router for each routed layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM, Qwen2Model
from transformers import initialization as init
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration import RoutedConfig
from .routing import NO_SEGMENT, CalibratedThreshold, Router, RoutingContext, RoutingResult, causal_mask
from .surprise import SurpriseGate, inverse_softplus


@dataclass
class RoutedModelOutput(ModelOutput):
    """Output of the backbone.

    Attributes:
        last_hidden_state: (B, T, D), after the final norm.
        routing: layer index → what the routed layer reports.
    """

    last_hidden_state: Tensor | None = None
    routing: dict[int, RoutingResult] | None = None


@dataclass
class RoutedCausalLMOutput(ModelOutput):
    """Output of the language model.

    Attributes:
        loss: with labels; in training the language-model loss plus the weighted auxiliary losses.
        logits: (B, T, vocabulary).
        language_model_loss: cross-entropy alone, nats per target token.
        auxiliary_losses: name → mean over routed layers, not weighted; training only.
        routing: layer index → what the routed layer reports.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    language_model_loss: Tensor | None = None
    auxiliary_losses: dict[str, Tensor] | None = None
    routing: dict[int, RoutingResult] | None = None


class RoutedModel(Qwen2Model):
    """Qwen2 backbone in which some layers compute only selected tokens."""

    config: RoutedConfig
    router_class: type[Router]

    def __init__(self, config: RoutedConfig):
        super().__init__(config)
        self.routers = nn.ModuleDict(
            {str(index): self.router_class(config) for index in config.routed_layers}
        )
        self.routers.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_router_part(module)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> RoutedModelOutput:
        """Run the layers.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding.
            position_ids: (B or 1, T). A position that does not follow its predecessor starts a document;
                documents of a row do not see one another.
            inputs_embeds: (B, T, D) in place of input_ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = hidden_states.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden_states.device).unsqueeze(0)
        segments = row_segments(position_ids, attention_mask, batch)
        eager = self.config._attn_implementation == "eager"
        context = RoutingContext(
            position_ids=position_ids,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            segments=segments,
            attention_mask=causal_mask(segments, None, eager, hidden_states.dtype),
            eager=eager,
        )
        if eager and context.attention_mask is None:
            # Eager attention has no causal switch of its own: it needs the mask spelled out.
            context.segments = torch.zeros(batch, length, dtype=torch.long, device=hidden_states.device)
            context.attention_mask = causal_mask(context.segments, None, eager, hidden_states.dtype)
        previous, routing = hidden_states, {}
        for index, block in enumerate(self.layers):
            layer_input = hidden_states
            if str(index) in self.routers:
                hidden_states, routing[index] = self.routers[str(index)](
                    block, hidden_states, previous, context
                )
            else:
                hidden_states = block(
                    hidden_states,
                    attention_mask=context.attention_mask,
                    position_ids=position_ids,
                    position_embeddings=context.position_embeddings,
                )
            previous = layer_input
        return RoutedModelOutput(last_hidden_state=self.norm(hidden_states), routing=routing)


class RoutedForCausalLM(Qwen2ForCausalLM):
    """Language model over a routed backbone."""

    config: RoutedConfig
    model_class: type[RoutedModel]

    def __init__(self, config: RoutedConfig):
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_router_part(module)

    def set_progress(self, step: int, total_steps: int) -> None:
        """Move every schedule that changes the forward to optimizer step `step` of `total_steps`."""
        for router in self.model.routers.values():
            assert isinstance(router, Router)
            router.set_progress(step, total_steps)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        num_tokens_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> RoutedCausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in `RoutedModel.forward`.
            labels: (B, T), -100 where there is no target; shifted inside.
            logits_to_keep: as in Qwen2.
            num_items_in_batch: targets of the whole optimizer step, over micro-batches and ranks; the
                language-model loss is then a sum divided by it.
            num_tokens_in_batch: valid tokens of the whole optimizer step; scales the auxiliary losses alike.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError(f"{self.config.model_type} has no cache yet: generate with use_cache=False")
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds)
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = language_model_loss = auxiliary = None
        if labels is not None:
            language_model_loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            auxiliary, total = combine_losses(outputs.routing)
            if num_tokens_in_batch is not None:
                tokens = labels.numel() if attention_mask is None else attention_mask.sum()
                total = total * (tokens / num_tokens_in_batch)
            loss = language_model_loss + total
        return RoutedCausalLMOutput(
            loss=loss,
            logits=logits,
            language_model_loss=language_model_loss,
            auxiliary_losses=auxiliary,
            routing=outputs.routing,
        )


def row_segments(position_ids: Tensor, attention_mask: Tensor | None, batch: int) -> Tensor | None:
    """Document numbers (B, T), `NO_SEGMENT` for padding; None where each row is one unpadded document."""
    position_ids = position_ids.expand(batch, -1)
    segments = find_packed_sequence_indices(position_ids)
    if attention_mask is None or attention_mask.all():
        return segments
    if segments is None:
        segments = torch.zeros_like(position_ids)
    return segments.masked_fill(attention_mask == 0, NO_SEGMENT)


def combine_losses(routing: dict[int, RoutingResult]) -> tuple[dict[str, Tensor], Tensor | float]:
    """Means over routed layers of each auxiliary loss, and their weighted sum."""
    collected: dict[str, list[Tensor]] = {}
    weights: dict[str, float] = {}
    for result in routing.values():
        for name, (weight, value) in result.losses.items():
            collected.setdefault(name, []).append(value)
            weights[name] = weight
    means = {name: torch.stack(values).mean() for name, values in collected.items()}
    return means, sum(weights[name] * mean for name, mean in means.items())


def initialize_router_part(module: nn.Module) -> None:
    """Initial values of parameters and buffers that transformers does not know."""
    if isinstance(module, SurpriseGate):
        init.constant_(module.raw_offset_ce, inverse_softplus(module.config.offset_ce_init))
        init.constant_(module.raw_multiplier_cu, inverse_softplus(module.config.multiplier_cu_init))
        init.constant_(module.beta, module.config.beta_start)
    elif isinstance(module, CalibratedThreshold):
        init.zeros_(module.average)
        init.zeros_(module.steps)
