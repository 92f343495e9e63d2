"""Backbone of the routed models, and what every head on it shares.

The backbone is transformers' Qwen2: every tensor keeps Qwen2's name, so a pretrained checkpoint maps one to
one. What is new lies under `model.routers`, one router for each routed layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Model, Qwen2PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast

from .adapters import WithAdapters
from .cache import RoutedCache, row_segments
from .carried import CarriedCode
from .configuration import CACHE_NAME, RoutedConfig
from .heads import ScoreHead, ScoreMap
from .routing import Block, Router, RoutingContext, causal_mask
from .selection import RoutingResult
from .state import LayerState, RoutingState, beta_at
from .surprise import SurpriseGate, inverse_softplus

ROUTERS = {"model.routers", "routers"}  # are fp32 in an fp16 model, and no quantiser converts them
# What transformers shall not cast when it loads a checkpoint in bf16: what lies in an `Fp32Module`.
FP32_MODULES = {"raw_offset_ce", "raw_multiplier_cu", "routing_state"}


@dataclass
class RoutedModelOutput(BaseModelOutputWithPast):
    """Output of the backbone, as transformers' own, whose name for the cache it takes over.

    Attributes:
        last_hidden_state: (B, T, D), after the final norm.
        past_key_values: the cache, if one was used; `cache` from transformers 5.24 on.
        hidden_states: if asked for, the embeddings and each layer's output, the last after the final norm.
        routing: layer index → what the routed layer reports.
    """

    routing: dict[int, RoutingResult] | None = None


class RoutedPreTrainedModel(CarriedCode, WithAdapters, Qwen2PreTrainedModel):
    """What transformers must know of every routed model."""

    # Flash kernels read positions with gaps, as selected tokens have, as the start of documents.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _keep_in_fp32_modules = ROUTERS
    _keep_in_fp32_modules_strict = FP32_MODULES
    config: RoutedConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize_router_part(module, self.config)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **options
    ) -> None:
        """Let a routed layer be computed again as a whole, with its router, and keep its input alone.

        Raises:
            ValueError: reentrant checkpoints, which lose the gradients of the auxiliary losses.
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("gradient checkpointing of a routed model needs use_reentrant=False")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)
        backbone = self.base_model
        assert isinstance(backbone, RoutedModel)
        for index, router in backbone.routers.items():
            block = backbone.layers[int(index)]
            # By vars, as transformers' flags are no tensors and no modules.
            vars(router)["gradient_checkpointing"] = block.gradient_checkpointing
            vars(block)["gradient_checkpointing"] = False


class RoutedModel(RoutedPreTrainedModel, Qwen2Model):
    """Qwen2 backbone in which some layers compute only selected tokens."""

    router_class: type[Router]

    def __init__(self, config: RoutedConfig):
        super().__init__(config)
        self.routers = nn.ModuleDict(
            {str(index): self.router_class(config) for index in config.routed_layers}
        )
        self.routing_state = RoutingState(config)
        self.routers.apply(self._init_weights)
        self._init_weights(self.routing_state)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: RoutedCache | None = None,
        **kwargs,
    ) -> RoutedModelOutput:
        """Run the layers.

        Args:
            input_ids: (B, T).
            attention_mask: 0 for padding, (B, S + T); S is the length of the past.
            position_ids: (B or 1, T); counted from `attention_mask` when not given. A position that does not
                follow its predecessor starts a document; documents of a row do not see one another.
            past_key_values: the past, to which the present is added; an empty `DynamicCache` will do.
            inputs_embeds: (B, T, D) in place of input_ids.
            use_cache: make a cache when none is given; not in training mode, nor with the `topk` rule.
                Default: as configured.
            output_hidden_states: default: as configured.
            cache: the same as `past_key_values`, as transformers names it from 5.24 on.

        Raises:
            ValueError: inputs that do not fit together, a cache of another kind or where none can work, or
                attention weights asked for, which have no common shape over routed layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: not available in a model with routed layers")
        cache = past_key_values if cache is None else cache
        if cache is not None:
            if not self.cacheable:
                reason = "training mode selects" if self.training else "selection_rule='topk' selects"
                raise ValueError(f"past_key_values: {reason} among all tokens of a row, so it has no cache")
            cache = RoutedCache.of(cache, self.config)
        elif self.cacheable and (self.config.use_cache if use_cache is None else use_cache):
            cache = RoutedCache(self.config)
        context = self.routing_context(hidden_states, attention_mask, position_ids, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = dict(zip(self.config.routed_layers, self.routing_state(hidden_states), strict=True))
        previous, routing, seen = hidden_states, {}, []
        for index, block in enumerate(self.layers):
            layer_input = hidden_states
            if output_hidden_states:
                seen.append(layer_input)
            hidden_states, result = self.run_layer(
                Block(block, index), hidden_states, previous, context, states.get(index)
            )
            if result is not None:
                routing[index] = result
            previous = layer_input
        if cache is not None:
            for index in routing:
                cache.routed(index).seen_tokens = context.past + hidden_states.shape[1]
        if self.training and routing:
            self.routing_state.note(torch.stack([result.quantiles for result in routing.values()], dim=1))
        last = self.norm(hidden_states)
        return RoutedModelOutput(
            last_hidden_state=last,
            hidden_states=(*seen, last) if output_hidden_states else None,
            routing=routing,
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )

    def run_layer(
        self,
        block: Block,
        hidden_states: Tensor,
        previous_hidden_states: Tensor,
        context: RoutingContext,
        state: LayerState | None,
    ) -> tuple[Tensor, RoutingResult | None]:
        """Hidden states (B, T, D) after one layer, and what it reports if it is routed.

        Args:
            hidden_states: the layer's input, (B, T, D).
            previous_hidden_states: the input of the layer below, (B, T, D).
            state: of a routed layer; None for a dense one.
        """
        if state is not None:
            router = self.routers[str(block.layer)]
            return router(block, hidden_states, previous_hidden_states, context, state)
        output = block(
            hidden_states,
            attention_mask=context.attention_mask,
            position_ids=context.position_ids,
            position_embeddings=context.position_embeddings,
            **{CACHE_NAME: context.cache},
        )
        return output, None

    @property
    def cacheable(self) -> bool:
        """Whether tokens can be given one at a time: not where whole rows compete for capacity."""
        return not self.training and self.config.selection_rule != "topk"

    def routing_context(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: RoutedCache | None,
    ) -> RoutingContext:
        """Positions, documents and masks that all layers share; tells the cache of the present tokens."""
        batch, length, _ = hidden_states.shape
        device, dtype = hidden_states.device, hidden_states.dtype
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation={implementation!r}: routed models run with sdpa or eager")
        past = cache.get_seq_length() if cache is not None else 0
        valid = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + length):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; "
                    f"(rows, past and present tokens) is {(batch, past + length)}"
                )
            known = attention_mask != 0
            present = known[:, past:]
            if self.training:
                valid = present  # whether there is padding is not asked: the host would wait for the answer
            else:
                as_read = cache.knows(known[:, :past]) if cache is not None else known.new_ones(())
                same, whole = torch.stack([as_read, present.all()]).tolist()  # one wait
                if not same:
                    raise ValueError(
                        "attention_mask differs from the one with which the cached tokens were read"
                    )
                valid = None if whole else present
        one_document = self.training and position_ids is None and valid is None
        if position_ids is None:
            if valid is None:
                position_ids = torch.arange(length, device=device).unsqueeze(0)
            else:
                position_ids = (valid.long().cumsum(1) - 1).clamp(min=0)
            if cache is not None and cache.last_position is not None:
                position_ids = position_ids + cache.last_position + 1
        segments = None
        if not one_document:
            segments = row_segments(position_ids.expand(batch, -1), valid, cache, ask=not self.training)
        eager = implementation == "eager"
        mask = None
        if segments is not None or eager or (past and length > 1):
            slots = torch.arange(past + length, device=device).unsqueeze(0)
            numbers = segments if segments is not None else torch.zeros_like(slots).expand(batch, -1)
            mask = causal_mask(slots[:, past:], numbers[:, past:], slots, numbers, eager, dtype)
        context = RoutingContext(
            position_ids=position_ids,
            position_embeddings=self.rotary_emb(hidden_states, position_ids),
            segments=segments,
            valid=valid,
            past=past,
            attention_mask=mask,
            eager=eager,
            cache=cache,
        )
        if self.training:
            context.document_starts(length)  # found here: in a checkpointed layer nothing may be remembered
        return context


class RoutedModelWithHead(RoutedPreTrainedModel):
    """A routed backbone, `model`, under a head: what training moves in it."""

    model_class: type[RoutedModel]
    model: RoutedModel

    @property
    def routing_state(self) -> RoutingState:
        """Thresholds and β, an adapter's own where one is active."""
        return self.model.routing_state

    def set_progress(self, step: int, total_steps: int) -> None:
        """Move every schedule that changes the forward to optimizer step `step` of `total_steps`."""
        self.routing_state.set_progress(step, total_steps)

    def advance(self, keep: bool = True) -> None:
        """Move the thresholds after an optimizer step, on all ranks together.

        Args:
            keep: false after a step without an update.
        """
        self.routing_state.advance(keep)


def row_shares(targets: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Share of each row in the targets of the optimizer step, (B,).

    Args:
        targets: which labels of these rows are targets, (B, any) bool.
        num_items_in_batch: targets of the step; None: of these rows.
    """
    counts = targets.sum(1)
    return counts / (counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def combine_losses(
    routing: dict[int, RoutingResult], shares: Tensor
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Means over routed layers of each auxiliary loss, and their weighted sum.

    Args:
        shares: of each row in the step, (B,).
    """
    collected: dict[str, list[Tensor]] = {}
    weights: dict[str, float] = {}
    for result in routing.values():
        for name, (weight, rows) in result.losses.items():
            collected.setdefault(name, []).append((shares.to(rows.device) * rows).sum())
            weights[name] = weight
    means = {name: torch.stack(values).mean() for name, values in collected.items()}
    return means, sum(weights[name] * mean for name, mean in means.items())


def initialize_router_part(module: nn.Module, config: RoutedConfig) -> None:
    """Initial values of parameters and buffers that transformers does not know."""
    if isinstance(module, (ScoreHead, ScoreMap)):
        init.normal_(module.weight, mean=0.0, std=config.initializer_range)
    elif isinstance(module, SurpriseGate):
        init.constant_(module.raw_offset_ce, inverse_softplus(module.config.offset_ce_init))
        init.constant_(module.raw_multiplier_cu, inverse_softplus(module.config.multiplier_cu_init))
    elif isinstance(module, RoutingState):
        init.zeros_(module.thresholds)
        init.zeros_(module.weights)
        init.constant_(module.beta, beta_at(module.config, 0, 1))
