"""Select tokens, run a block on them alone, add the gated update back: what MoD, SDT and STT share.

Shape suffixes: B rows, T tokens of a row, K selected tokens of a row, D hidden size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .cache import EMPTY, NO_SEGMENT, RoutedCache
from .configuration import RoutedConfig


@dataclass
class RoutingContext:
    """What a routed layer needs to know of its rows. S tokens are past, T present.

    Attributes:
        position_ids: RoPE positions, (B or 1, T).
        position_embeddings: cosine and sine, each (B or 1, T, head_dim).
        segments: document number of each past and present token, `NO_SEGMENT` for padding, (B, S + T);
            None where every row is one document without padding.
        past: S.
        attention_mask: the dense layers' mask, as the attention implementation wants it; None: plain causal.
        eager: whether attention wants an additive mask instead of a boolean one.
        cache: None in training and without a cache.
    """

    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    segments: Tensor | None
    past: int
    attention_mask: Tensor | None
    eager: bool
    cache: RoutedCache | None

    @property
    def valid(self) -> Tensor | None:
        """Present tokens that are not padding, (B, T); None: all."""
        return None if self.segments is None else self.segments[:, self.past :] != NO_SEGMENT

    def segment_starts(self, length: int, device: torch.device) -> Tensor:
        """For each of the last `length` tokens, the first of its document among them, (B or 1, length)."""
        index = torch.arange(length, device=device).unsqueeze(0)
        if self.segments is None:
            return torch.zeros_like(index)
        segments = self.segments[:, self.segments.shape[1] - length :]
        changed = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        return torch.where(changed, index, 0).cummax(dim=1).values

    def with_history(self, values: Tensor, layer: int, length: int) -> Tensor:
        """`values` behind those of the tokens just before, as the cache of routed layer `layer` holds them.

        Args:
            values: of the present tokens, (B, T, ...).
            length: how many earlier tokens' values the router looks back on.

        Returns:
            (B, h + T, ...), h = min(S, length); the cache then holds the last `length` of them.
        """
        if self.cache is None:
            return values
        cached = self.cache.routed(layer)
        if cached.state is not None:
            values = torch.cat([cached.state, values], dim=1)
        cached.state = values[:, max(0, values.shape[1] - length) :]
        return values


@dataclass
class RoutingResult:
    """What a routed layer reports beside its hidden states.

    Attributes:
        selected: tokens that the block computed, (B, T) bool.
        computed: K / T, places that the block ran on: as many as the row with the most selected tokens has.
        score: what selection compares, detached, (B, T); STT: the student's logits.
        gate: g of every token, selected or not, detached, (B, T).
        losses: name → (weight, mean over valid tokens); training only.
    """

    selected: Tensor
    computed: float
    score: Tensor
    gate: Tensor
    losses: dict[str, tuple[float, Tensor]] = field(default_factory=dict)


@dataclass
class Selection:
    """Selected tokens of each row.

    Attributes:
        indices: their indices in the row, ascending, (B, K).
        valid: which of the K places are in use, (B, K); None: all.
    """

    indices: Tensor
    valid: Tensor | None

    def mask(self, length: int) -> Tensor:
        """Membership of each of the row's `length` tokens, (B, T) bool."""
        source = torch.ones_like(self.indices, dtype=torch.bool) if self.valid is None else self.valid
        mask = torch.zeros(len(self.indices), length, dtype=torch.int32, device=self.indices.device)
        return mask.scatter_add(1, self.indices, source.int()).bool()

    def result(
        self, score: Tensor, gate: Tensor, losses: dict[str, tuple[float, Tensor]] | None = None
    ) -> RoutingResult:
        """What a routed layer with this selection reports."""
        length = score.shape[1]
        computed = self.indices.shape[1] / length
        return RoutingResult(self.mask(length), computed, score.detach(), gate.detach(), losses or {})


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


def capacity_to_tokens(capacity: float, tokens: Tensor | int) -> Tensor:
    """k = max(1, ⌊γ·n⌋), at most n; the small term undoes rounding of products such as 0.29·100."""
    tokens = torch.as_tensor(tokens)
    k = (capacity * tokens.double() + 1e-9).floor().long()
    return torch.minimum(k.clamp(min=1), tokens)


def select_top_k(scores: Tensor, capacity: float, valid: Tensor | None) -> Selection:
    """The k best-scored valid tokens of each row, in ascending order. Non-causal: a training rule.

    Args:
        scores: (B, T).
        capacity: γ in (0, 1].
        valid: (B, T) bool; padding never competes, and k counts valid tokens only.
    """
    length = scores.shape[1]
    width = int(capacity_to_tokens(capacity, length))
    if valid is None:
        indices = scores.topk(width, dim=1, sorted=False).indices
        return Selection(indices.sort(dim=1).values, None)
    indices = scores.masked_fill(~valid, -torch.inf).topk(width, dim=1).indices
    used = torch.arange(width, device=scores.device) < capacity_to_tokens(
        capacity, valid.sum(1, keepdim=True)
    )
    indices = torch.where(used, indices, length).sort(dim=1).values
    return Selection(indices.clamp(max=length - 1), indices < length)


def select_mask(mask: Tensor) -> Selection:
    """The tokens of a membership mask (B, T); K is the largest count of a row, possibly 0."""
    counts = mask.sum(1)
    least, width = counts.aminmax()
    width = int(width)
    indices = mask.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    used = None if least == width else torch.arange(width, device=mask.device) < counts[:, None]
    return Selection(indices, used)


def routed_update(
    block: Qwen2DecoderLayer,
    hidden_states: Tensor,
    selection: Selection,
    gate: Tensor,
    context: RoutingContext,
) -> Tensor:
    """y = x + g·(F(x̃) − x) at the selected tokens, y = x elsewhere.

    F sees the selected tokens x̃ alone, at their original RoPE positions: Q, K, V, scores and MLP are
    computed for (B, K, D), and nothing for the others.

    Args:
        block: a Qwen2 decoder layer with its residuals.
        hidden_states: (B, T, D).
        gate: g, (B, T).
        context: the layer's own keys and values join its cache, if there is one.
    """
    batch, length, _ = hidden_states.shape
    indices = selection.indices
    count = indices.shape[1]
    if count == 0:
        return hidden_states
    rows = None
    if count < length or selection.valid is not None:
        rows = (indices + length * torch.arange(batch, device=indices.device).unsqueeze(1)).flatten()

    def gather_rows(values: Tensor) -> Tensor:
        values = values.expand(batch, *values.shape[1:])
        return (
            values if rows is None else values.flatten(0, 1).index_select(0, rows).unflatten(0, indices.shape)
        )

    selected = gather_rows(hidden_states)
    cos, sin = context.position_embeddings
    output = block(
        selected,
        attention_mask=selected_mask(block.self_attn.layer_idx, selection, context, hidden_states.dtype),
        position_ids=gather_rows(context.position_ids),
        position_embeddings=(gather_rows(cos), gather_rows(sin)),
        past_key_values=context.cache,
    )
    update = gather_rows(gate).unsqueeze(-1) * (output - selected)
    if selection.valid is not None:
        update = update.masked_fill(~selection.valid.unsqueeze(-1), 0)
    update = update.to(hidden_states.dtype)
    if rows is None:
        return hidden_states + update
    flat = hidden_states.flatten(0, 1)
    return flat.index_add(0, rows, update.flatten(0, 1)).view_as(hidden_states)


def selected_mask(
    layer: int, selection: Selection, context: RoutingContext, dtype: torch.dtype
) -> Tensor | None:
    """Mask among a routed layer's selected tokens, those in its cache included; None: plain causal."""
    indices, past = selection.indices, context.past
    slots = indices + past
    cached = None if context.cache is None else context.cache.routed(layer)
    if context.segments is None and selection.valid is None:
        key_slots = slots if cached is None else cached.append(slots)
        full = len(slots) == 1 or not (key_slots == EMPTY).any()
        plain = key_slots.shape == slots.shape or (slots.shape[1] == 1 and full)
        if plain and not context.eager:
            return None
    elif cached is not None:
        used = slots if selection.valid is None else slots.masked_fill(~selection.valid, EMPTY)
        key_slots = cached.append(used)
    else:
        key_slots = slots

    def segments_of(places: Tensor, used: Tensor | None) -> Tensor:
        if context.segments is None:
            segments = torch.zeros_like(places)
        else:
            segments = context.segments.gather(1, places.clamp(min=0))
        return segments if used is None else segments.masked_fill(~used, NO_SEGMENT)

    query_segments = segments_of(slots, selection.valid)
    key_segments = query_segments if cached is None else segments_of(key_slots, key_slots != EMPTY)
    return causal_mask(slots, query_segments, key_slots, key_segments, context.eager, dtype)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, T) `values` over valid tokens."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def previous_token(values: Tensor, starts: Tensor) -> Tensor:
    """values[t−1] at t, zero at each document's first token.

    Args:
        values: (B, T, D).
        starts: index of the first token of each token's document, (B or 1, T).
    """
    shifted = F.pad(values[:, :-1], (0, 0, 1, 0))
    first = starts == torch.arange(values.shape[1], device=values.device)
    return shifted.masked_fill(first.unsqueeze(-1), 0)


class CalibratedThreshold(nn.Module):
    """τ of the `threshold` rule: bias-corrected moving average of the scores' (1 − γ) quantile.

    Exactly causal: τ is a constant of the checkpoint. After Expert Threshold routing (arXiv 2603.11535).
    Before any training step τ is 0.

    Attributes:
        value: τ, a scalar in fp32.
        weight: total weight of the quantiles in `value` before the correction; towards 1.
        decay: ρ.
    """

    value: Tensor
    weight: Tensor

    def __init__(self, decay: float):
        super().__init__()
        self.decay = self.longest_decay = decay
        self.register_buffer("value", torch.zeros((), dtype=torch.float32))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float32))

    def set_progress(self, total_steps: int) -> None:
        """Look back over a twentieth of the run at most, but ten steps at least.

        In a run of a few hundred steps ρ = 0.99 would still hold what early weights scored.
        """
        self.decay = min(self.longest_decay, 1 - 1 / max(10.0, total_steps / 20))

    @torch.no_grad()
    def update(self, scores: Tensor, fraction: Tensor | float, valid: Tensor | None) -> None:
        """One step of the average, over valid tokens, averaged over ranks.

        Args:
            scores: (B, T).
            fraction: share of the tokens that shall lie above τ.
        """
        scores = scores.detach().float()
        if valid is not None:
            scores = torch.where(valid, scores, torch.nan)
        level = torch.as_tensor(1.0 - fraction, dtype=torch.float32, device=scores.device)
        quantile = scores.flatten().nanquantile(level)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(quantile)
            quantile /= torch.distributed.get_world_size()
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.decay)
        self.value += (1 - self.decay) / self.weight * (quantile.to(self.value.dtype) - self.value)


class Predictor(nn.Module):
    """Membership of the training top-k, predicted from the token alone (MoD, section 3.5, method 2).

    d → d/2 → 1, SiLU, no biases. The input is detached: no gradient reaches the language model.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, hidden_size // 2, bias=False)
        self.down_proj = nn.Linear(hidden_size // 2, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (B, T) in fp32 for hidden states (B, T, D)."""
        return self.down_proj(F.silu(self.up_proj(hidden_states.detach()))).squeeze(-1).float()


class Router(nn.Module):
    """Base of the three routers: the selection rules, and what they need from training."""

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.config = config
        self.training_capacity = config.capacity
        self.threshold = CalibratedThreshold(config.threshold_decay)
        self.predictor = Predictor(config.hidden_size) if config.predictor_weight else None
        self.predictor_threshold = CalibratedThreshold(config.threshold_decay) if self.predictor else None

    def set_progress(self, step: int, total_steps: int) -> None:
        """Move schedules to optimizer step `step` of `total_steps`; the trainer calls it before each step.

        The training capacity falls from 1 to γ over the first `capacity_warmup_steps`.
        """
        warmup = self.config.capacity_warmup_steps
        done = min(1.0, step / warmup) if warmup else 1.0
        self.training_capacity = 1.0 + (self.config.capacity - 1.0) * done
        self.threshold.set_progress(total_steps)
        if self.predictor_threshold is not None:
            self.predictor_threshold.set_progress(total_steps)

    def select_for_training(
        self, scores: Tensor, hidden_states: Tensor, context: RoutingContext
    ) -> tuple[Selection, dict[str, tuple[float, Tensor]]]:
        """Top-k selection at the training capacity; calibrates τ and trains the predictor.

        Args:
            scores: (B, T) fp32.
            hidden_states: (B, T, D), the predictor's input.

        Returns:
            The selection, and the predictor's loss if there is a predictor.
        """
        selection = select_top_k(scores.detach(), self.training_capacity, context.valid)
        self.threshold.update(scores, self.training_capacity, context.valid)
        losses = {}
        if self.predictor is not None and self.predictor_threshold is not None:
            logits = self.predictor(hidden_states)
            self.predictor_threshold.update(logits, self.training_capacity, context.valid)
            loss = membership_loss(logits, selection, context.valid)
            losses["predictor"] = (self.config.predictor_weight, loss)
        return selection, losses

    def select(self, scores: Tensor, hidden_states: Tensor, context: RoutingContext) -> Selection:
        """Selection in eval mode, by `config.selection_rule`; strictly causal unless that is `topk`.

        Args:
            scores: (B, T) fp32.
            hidden_states: (B, T, D), the predictor's input.

        Raises:
            ValueError: the model lacks what the rule needs.
        """
        rule = self.config.selection_rule
        if rule == "topk":
            return select_top_k(scores, self.config.capacity, context.valid)
        if rule == "threshold":
            # At full capacity no token may be left out, not even that with the lowest score.
            full = self.config.capacity == 1
            mask = torch.ones_like(scores, dtype=torch.bool) if full else scores > self.threshold.value
        elif rule == "aux":
            mask = scores > 0
        elif rule == "predictor":
            mask = self.predicted_membership(scores, hidden_states) > 0
        elif rule == "calibrated_predictor" and self.predictor_threshold is not None:
            logits = self.predicted_membership(scores, hidden_states)
            mask = logits > self.predictor_threshold.value
        else:
            raise ValueError(
                f"selection_rule={rule!r}: must be threshold, predictor, calibrated_predictor, aux or topk, "
                "and one that the model was built for"
            )
        return select_mask(mask if context.valid is None else mask & context.valid)

    def predicted_membership(self, scores: Tensor, hidden_states: Tensor) -> Tensor:
        """The predictor's logits, (B, T) fp32.

        Raises:
            ValueError: the model was built without a predictor.
        """
        if self.predictor is None:
            raise ValueError("selection_rule='predictor': the model has none; predictor_weight was 0")
        return self.predictor(hidden_states)


def membership_loss(logits: Tensor, selection: Selection, valid: Tensor | None) -> Tensor:
    """Binary cross-entropy of (B, T) `logits` against membership of the selection, mean over valid tokens."""
    target = selection.mask(logits.shape[1]).to(logits.dtype)
    return masked_mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), valid)
