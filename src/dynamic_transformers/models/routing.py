"""Run a block on selected tokens alone and add the gated update back: what MoD, SDT and STT share.

Shapes: B rows, T tokens of a row, R rows with K selected tokens, D hidden size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import EMPTY, NO_SEGMENT, RoutedCache
from .configuration import CACHE_NAME, RoutedConfig
from .heads import Predictor
from .rules import evenly_spaced, select_first
from .selection import Selection, score_quantile, select_mask, select_top_k
from .state import LayerState


@dataclass
class RoutingContext:
    """What a routed layer needs to know of its rows. S tokens are past, T present.

    Attributes:
        position_ids: RoPE positions, (B or 1, T).
        position_embeddings: cosine and sine, each (B or 1, T, head_dim).
        segments: document number of each past and present token, `NO_SEGMENT` for padding, (B, S + T);
            None where every row is one document without padding.
        valid: present tokens that are not padding, (B, T); None: all.
        past: S.
        attention_mask: the dense layers' mask, as the attention implementation wants it; None: plain causal.
        eager: whether attention wants an additive mask instead of a boolean one.
        cache: None in training and without a cache.
    """

    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    segments: Tensor | None
    valid: Tensor | None
    past: int
    attention_mask: Tensor | None
    eager: bool
    cache: RoutedCache | None
    _document_starts: dict[int, Tensor] = field(default_factory=dict)

    def document_starts(self, length: int) -> Tensor | None:
        """For each of the last `length` tokens, the first of its document among them, (B, length).

        None where every row is one document without padding.
        """
        if self.segments is None:
            return None
        if length not in self._document_starts:
            segments = self.segments[:, -length:]
            index = torch.arange(length, device=segments.device)
            changed = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
            self._document_starts[length] = torch.where(changed, index, 0).cummax(dim=1).values
        return self._document_starts[length]

    def document_places(self) -> Tensor:
        """How many tokens of its document precede each present token, (B or 1, T)."""
        length = self.past + self.position_ids.shape[1]
        index = torch.arange(self.past, length, device=self.position_ids.device).unsqueeze(0)
        starts = self.document_starts(length)
        return index if starts is None else index - starts[:, self.past :]

    def with_history(self, values: Tensor, layer: int, length: int) -> Tensor:
        """`values` behind those of the tokens just before, as the cache of routed layer `layer` holds them.

        Args:
            values: of the present tokens, (B, T).
            length: how many earlier tokens' values the router looks back on.

        Returns:
            (B, h + T), h = min(S, length); the cache then holds the last `length` of them.
        """
        if self.cache is None:
            return values
        cached = self.cache.routed(layer)
        if cached.state is not None:
            values = torch.cat([cached.state, values], dim=1)
        # A copy: a view would hold the memory of the whole prompt.
        cached.state = values[:, max(0, values.shape[1] - length) :].detach().clone()
        return values


def causal_mask(
    query_slots: Tensor,
    query_segments: Tensor,
    key_slots: Tensor,
    key_segments: Tensor,
    eager: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Mask under which a token sees its own document's earlier tokens and itself.

    Padding sees everything, so that no row of the mask is empty (softmax would give NaN); none see it.

    Args:
        query_slots, key_slots: indices of the tokens in their rows, (B or 1, Q) and (B or 1, K).
        query_segments, key_segments: their document numbers, (B, Q) and (B, K).
        eager: give an additive mask of `dtype`.

    Returns:
        (B, 1, Q, K), True or 0 where attention is allowed.
    """
    allowed = key_slots[:, None, :] <= query_slots[:, :, None]
    allowed = allowed & (key_segments[:, None, :] == query_segments[:, :, None])
    allowed = (allowed | (query_segments == NO_SEGMENT)[:, :, None]).unsqueeze(1)
    if not eager:
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


class Block:
    """A Qwen2 decoder layer with its residuals, as a router calls it.

    Tools that offload a model move what the forward of a module is given, and would move a module, too.

    Attributes:
        layer: its index.
    """

    def __init__(self, module: nn.Module, layer: int):
        self._module, self.layer = module, layer

    def __call__(self, hidden_states: Tensor, **options) -> Tensor:
        """Its output, (B, T, D) for (B, T, D)."""
        return self._module(hidden_states, **options)


def routed_update(
    block: Block,
    hidden_states: Tensor,
    selection: Selection,
    gate: Tensor,
    context: RoutingContext,
) -> Tensor:
    """y = x + g·(F(x̃) − x) at the selected tokens, y = x elsewhere.

    F sees the selected tokens x̃ alone, at their original RoPE positions: Q, K, V, scores and MLP are
    computed for (R, K, D), and nothing for the others.

    Args:
        block: F.
        hidden_states: (B, T, D).
        gate: g, (B, T).
        context: the layer's own keys and values join its cache, if there is one.
    """
    batch, length, _ = hidden_states.shape
    indices = selection.indices
    if indices.numel() == 0:
        return hidden_states
    places, rows = None, selection.rows
    if indices.numel() < batch * length or selection.valid is not None:
        rows = torch.arange(batch, device=indices.device) if rows is None else rows
        places = rows if length == 1 else (indices + length * rows.unsqueeze(1)).flatten()

    def gather(values: Tensor) -> Tensor:
        """Of (B, T, ...), or (1, T, ...) where rows agree, those of the selected tokens, (R, K, ...)."""
        if places is None or (length == 1 and len(values) < batch):
            return values
        if length == 1:
            return values.index_select(0, places)
        of_values = places if len(values) == batch else indices.flatten()
        return values.flatten(0, 1).index_select(0, of_values).unflatten(0, indices.shape)

    selected = gather(hidden_states)
    cos, sin = context.position_embeddings
    output = block(
        selected,
        attention_mask=selected_mask(block.layer, selection, context, hidden_states.dtype),
        position_ids=gather(context.position_ids),
        position_embeddings=(gather(cos), gather(sin)),
        **{CACHE_NAME: context.cache},
    )
    update = gather(gate).unsqueeze(-1) * (output - selected)
    if selection.valid is not None:
        update = update.masked_fill(~selection.valid.unsqueeze(-1), 0)
    update = update.to(hidden_states.dtype)
    if places is None:
        return hidden_states + update
    if length == 1:  # no place twice; index_add starts threads for a few rows
        return hidden_states.index_copy(0, places, selected + update)
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, places, update.flatten(0, 1)).view_as(hidden_states)


def selected_mask(
    layer: int, selection: Selection, context: RoutingContext, dtype: torch.dtype
) -> Tensor | None:
    """Mask among a routed layer's selected tokens, those in its cache included; None: plain causal."""
    slots = selection.indices + context.past
    if selection.valid is not None:
        slots = slots.masked_fill(~selection.valid, EMPTY)
    key_slots, full = slots, True
    if context.cache is not None:
        cached = context.cache.routed(layer)
        assert selection.counts is not None
        key_slots, full = cached.append(slots, selection.rows, selection.counts)
    if selection.valid is None and context.segments is None and not context.eager:
        # Keys that are the queries' own, or all of each query's row; places without a token are neither.
        if full and (key_slots.shape == slots.shape or slots.shape[1] == 1):
            return None
        if slots.shape[1] == 1:  # a row's last token sees all that it has
            return (key_slots != EMPTY)[:, None, None]
    segments = context.segments
    if segments is not None and selection.rows is not None:
        segments = segments[selection.rows]

    def segments_of(slots: Tensor) -> Tensor:
        numbers = torch.zeros_like(slots) if segments is None else segments.gather(1, slots.clamp(min=0))
        return numbers.masked_fill(slots == EMPTY, NO_SEGMENT)

    return causal_mask(slots, segments_of(slots), key_slots, segments_of(key_slots), context.eager, dtype)


def row_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, T) `values` over each row's valid tokens, (B,); 0 for a row without any."""
    if valid is None:
        return values.mean(1)
    return torch.where(valid, values, 0).sum(1) / valid.sum(1).clamp(min=1)


def previous_token(values: Tensor, starts: Tensor | None) -> Tensor:
    """values[t−1] at t, zero at each document's first token.

    Args:
        values: (B, T, ...).
        starts: index of the first token of each token's document, (B, T); None: 0.
    """
    shifted = torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)
    if starts is None:
        return shifted
    first = starts == torch.arange(values.shape[1], device=values.device)
    return shifted.masked_fill(first.view(*first.shape, *[1] * (values.ndim - 2)), 0)


class Router(GradientCheckpointingLayer):
    """Base of the three routers: the selection rules, and what they need from training."""

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.config = config
        self.predictor = Predictor(config) if config.predictor_weight else None
        self.check_rule()

    def check_rule(self) -> str:
        """The configured selection rule.

        Raises:
            ValueError: the model cannot follow it.
        """
        rule, available = self.config.selection_rule, self.config.available_rules
        if rule not in available:
            raise ValueError(f"selection_rule={rule!r}: this model knows {', '.join(available)}")
        if self.config.training_rule not in ("topk", "threshold"):
            raise ValueError(f"training_rule={self.config.training_rule!r}: give topk or threshold")
        return rule

    def select_for_training(
        self, scores: Tensor, hidden_states: Tensor, context: RoutingContext, state: LayerState
    ) -> tuple[Selection, dict[str, tuple[float, Tensor]], Tensor]:
        """Selection at the training capacity; trains the predictor.

        Args:
            scores: (B, T) fp32.
            hidden_states: (B, T, D), the predictor's input.

        Returns:
            The selection, the predictor's loss if there is a predictor, and the quantiles for the thresholds.
        """
        capacity = state.training_capacity
        selection = self.training_selection(scores, context, state)
        quantile = score_quantile(scores, capacity, context.valid)
        if self.predictor is None:
            return selection, {}, torch.stack([quantile, torch.full_like(quantile, torch.nan)])
        logits = self.predictor(hidden_states)
        quantiles = torch.stack([quantile, score_quantile(logits, capacity, context.valid)])
        loss = membership_loss(logits, selection, context.valid)
        return selection, {"predictor": (self.config.predictor_weight, loss)}, quantiles

    def training_selection(
        self, scores: Tensor, context: RoutingContext, state: LayerState, best: Selection | None = None
    ) -> Selection:
        """What training computes: what a control says, what lies above τ, or the best.

        Within its bound `threshold` is as causal as in evaluation: of a row with more tokens above τ the
        first ones are computed.

        Args:
            scores: (B, T) fp32.
            best: what `topk` selects; None: the tokens with the highest scores.

        Raises:
            ValueError: `training_rule` is `threshold`, and evaluation has another rule.
        """
        capacity, rule, valid = state.training_capacity, self.config.selection_rule, context.valid
        if self.config.training_rule == "threshold" and rule != "threshold":
            raise ValueError(f"training_rule='threshold' needs selection_rule='threshold', not {rule!r}")
        scores = scores.detach()
        if rule == "random":
            return select_top_k(torch.rand_like(scores), capacity, valid)
        if rule == "even":
            spaced = evenly_spaced(context.document_places(), capacity)
            return select_first(spaced.expand_as(scores), capacity, valid)
        if state.training_rule == "threshold":
            return select_first(
                self.above_threshold(scores, state.threshold), self.config.training_fraction, valid
            )
        return select_top_k(scores, capacity, valid) if best is None else best

    def above_threshold(self, scores: Tensor, threshold: Tensor) -> Tensor:
        """Which scores lie above τ, (B, T); at full capacity all, even the lowest."""
        full = self.config.capacity == 1
        return torch.ones_like(scores, dtype=torch.bool) if full else scores > threshold

    def select(
        self, scores: Tensor, hidden_states: Tensor, context: RoutingContext, state: LayerState
    ) -> Selection:
        """Selection in eval mode, by `config.selection_rule`; strictly causal unless that is `topk`.

        Args:
            scores: (B, T) fp32.
            hidden_states: (B, T, D), the predictor's input.

        Raises:
            ValueError: the model lacks what the rule needs.
        """
        rule = self.check_rule()
        if rule == "topk":
            return select_top_k(scores, self.config.capacity, context.valid)
        if rule == "threshold":
            mask = self.above_threshold(scores, state.threshold)
        elif rule == "random":
            mask = torch.rand_like(scores) < self.config.capacity
        elif rule == "even":
            mask = evenly_spaced(context.document_places(), self.config.capacity).expand_as(scores)
        elif rule == "aux":
            mask = scores > 0
        elif self.predictor is None:
            mask = scores > 0  # STT: the scores are the student's logits, and the student is the predictor
        elif rule == "calibrated_predictor":
            mask = self.above_threshold(self.predictor(hidden_states), state.predictor_threshold)
        else:
            mask = self.predictor(hidden_states) > 0
        return select_mask(mask if context.valid is None else mask & context.valid)


def membership_loss(logits: Tensor, selection: Selection, valid: Tensor | None) -> Tensor:
    """Binary cross-entropy of (B, T) `logits` against membership, mean over each row's valid tokens, (B,)."""
    target = selection.mask.to(logits.dtype)
    return row_means(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), valid)
