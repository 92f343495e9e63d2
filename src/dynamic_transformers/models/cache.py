"""Cache of a routed model: keys and values of every token in dense layers, of selected tokens in routed ones.

Shapes: B rows, S past and T present tokens of a row; in a routed layer R rows with K present tokens that it
selected, and C cached tokens of a row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from .configuration import RoutedConfig

EMPTY = -1  # slot of a place that holds no token
NO_SEGMENT = -1  # document number of padding


class RoutedCacheLayer(CacheLayerMixin):
    """Keys and values of a routed layer's selected tokens, without room for any other.

    Rows differ in how many they have, so the tokens of all rows lie one after another in the order of their
    arrival, and a table says which are whose. Rows that a beam search copied share their tokens.

    Attributes:
        keys, values: (N, heads, head_dim), of the N tokens of all rows.
        places: (B, C), where among the N each row's tokens lie, ascending, then `EMPTY`; None for a single
            row, whose tokens lie in order.
        slots: (B, C), index in its row of each of these tokens, ascending, then `EMPTY`.
        counts: (B,), how many tokens each row has; None for a single row.
        lengths: the same numbers, on the host.
        state: what the router must remember of the last tokens, (B, any), ending with the last token; None
            before the first forward, and where the router needs nothing.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self):
        super().__init__()
        self.places: Tensor | None = None
        self.slots: Tensor | None = None
        self.counts: Tensor | None = None
        self.lengths: list[int] = []
        self.state: Tensor | None = None
        self._arriving: tuple[Tensor, Tensor] | None = None
        self._read: Tensor | None = None
        self.seen_tokens = 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.places = self.slots = self.counts = self.state = None
        self._arriving = self._read = None
        self.lengths = []
        self.is_initialized = False
        self.seen_tokens = 0

    def append(self, slots: Tensor, rows: Tensor | None, counts: list[int]) -> tuple[Tensor, bool]:
        """Announce the tokens whose keys and values the next `update` brings. The host does not wait.

        Args:
            slots: (R, K) ascending, then `EMPTY` where a row brings fewer.
            rows: which rows bring any, (R,); None: all.
            counts: how many each of the B rows brings.

        Returns:
            Slots of all tokens of these rows in the order in which `update` will return keys and values,
            (R, C), and whether none of them is `EMPTY`.
        """
        batch = len(counts)
        if batch == 1:
            self.slots = slots if self.slots is None else torch.cat([self.slots, slots], dim=1)
            self._read = None
            return self.slots, True
        if self.slots is None or self.places is None or self.counts is None:
            self.slots = self.places = slots.new_empty(batch, 0)
            self.counts, self.lengths = slots.new_zeros(batch), [0] * batch
        rows = torch.arange(batch, device=slots.device) if rows is None else rows
        self.lengths = [before + count for before, count in zip(self.lengths, counts, strict=True)]
        lengths = [length for length, count in zip(self.lengths, counts, strict=True) if count]
        least, width = min(lengths), max(lengths)
        more = max(0, width - self.slots.shape[1])
        self.slots, self.places = (
            F.pad(table, (0, more), value=EMPTY) for table in (self.slots, self.places)
        )
        before = self.counts[rows].unsqueeze(1)
        first, total = 0 if self.keys is None else len(self.keys), sum(counts)
        places = torch.arange(first, first + total, device=slots.device)
        if slots.numel() == total:
            index = torch.arange(slots.shape[1], device=slots.device)
            at, arrived, places = (rows.unsqueeze(1), before + index), slots, places.view(slots.shape)
            after = before + slots.shape[1]
            self._arriving = None
        else:
            used = slots != EMPTY
            row, index = torch.nonzero_static(used, size=total).unbind(1)
            self._arriving = row, index
            at, arrived = (rows[row], before[row, 0] + index), slots[row, index]
            after = before + used.sum(1, keepdim=True)
        self.counts = self.counts.index_copy(0, rows, after.squeeze(1))
        self.slots[at], self.places[at] = arrived, places
        self._read = self.places[rows, :width].clamp(min=0)
        return self.slots[rows, :width], least == width

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take data type and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add the announced tokens' keys and values, (R, heads, K, head_dim).

        Returns:
            Keys and values of all tokens of these rows, (R, heads, C, head_dim) each.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, keys = self._extend(self.keys, key_states)
        self.values, values = self._extend(self.values, value_states)
        return keys, values

    def _extend(self, old: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored once `new` is, and what attention reads of it."""
        arrived = new.transpose(1, 2)
        if self._read is None:
            stored = arrived[0] if old is None else torch.cat([old, arrived[0]])
            return stored, stored.unsqueeze(0).transpose(1, 2)
        arrived = arrived.flatten(0, 1) if self._arriving is None else arrived[self._arriving]
        stored = arrived if old is None else torch.cat([old, arrived])
        read = stored.index_select(0, self._read.flatten()).unflatten(0, self._read.shape)
        return stored, read.transpose(1, 2)

    def get_seq_length(self) -> int:
        """Tokens that the model has seen, computed here or not."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a dense layer would answer; the routed models build their masks from `slots`."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what the router must remember of earlier tokens is gone."""
        raise ValueError("a routed model's cache cannot be cropped; assisted decoding needs a standard model")

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows with these indices, in this order; a row may be repeated. A mask names those kept."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(1)
        change_tensors(self, ("state",), lambda value: value[rows.to(value.device)])
        if self.slots is None or self.keys is None or self.values is None:
            return
        self._tabulate()
        change_tensors(self, ("places", "slots", "counts"), lambda value: value[rows.to(value.device)])
        assert self.places is not None and self.counts is not None
        # What only rows that are gone had goes too.
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        width = max(self.lengths)
        self.slots, self.places = self.slots[:, :width], self.places[:, :width]
        used = self.places != EMPTY
        kept, places = self.places[used].unique(return_inverse=True)
        if len(kept) < len(self.keys):
            self.places = torch.full_like(self.places, EMPTY).masked_scatter(used, places)
            self.keys, self.values = self.keys[kept], self.values[kept]
        if len(rows) == 1:
            self.places, self.counts, self.lengths = None, None, []

    reorder_cache = batch_select_indices = select_rows  # type: ignore[assignment]  # argument names differ

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row; its copies share its tokens."""
        if repeats > 1:
            self._tabulate()
        self.lengths = [length for length in self.lengths for _ in range(repeats)]
        names = ("places", "slots", "counts", "state")
        change_tensors(self, names, lambda value: value.repeat_interleave(repeats, 0))

    def _tabulate(self) -> None:
        """Give a single row the table that several need."""
        if self.slots is not None and self.places is None:
            count = self.slots.shape[1]
            self.places = torch.arange(count, device=self.slots.device).unsqueeze(0)
            self.counts, self.lengths = self.slots.new_full((1,), count), [count]


class RoutedCache(Cache):
    """The layers' caches, and what all layers need to know of the rows' past.

    Attributes:
        segments: document number of each past token, `NO_SEGMENT` for padding, (B, S); None where every row
            is one document without padding.
        last_position: position of each row's last token, (B, 1).
    """

    def __init__(self, config: RoutedConfig):
        routed = config.routed_layers
        layers: list = [
            RoutedCacheLayer() if index in routed else DynamicLayer()
            for index in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self.segments: Tensor | None = None
        self.last_position: Tensor | None = None

    @classmethod
    def of(cls, cache: Cache, config: RoutedConfig) -> "RoutedCache":
        """The cache that a caller gave. An empty `DynamicCache` turns into a `RoutedCache`, in place.

        Callers go on with the object that they gave: with another in its stead the past would be lost.

        Raises:
            ValueError: a cache of another kind, or one that holds tokens of another model.
        """
        if type(cache) is DynamicCache and not cache.offloading and not cache.get_seq_length():
            cache.__class__ = cls  # type: ignore[assignment]
            cls.__init__(cache, config)  # type: ignore[arg-type]
        if not isinstance(cache, cls):
            kind = type(cache).__name__
            raise ValueError(f"{config.model_type} needs a RoutedCache or an empty DynamicCache; got {kind}")
        return cache

    def routed(self, index: int) -> RoutedCacheLayer:
        """The cache of routed layer `index`."""
        layer = self.layers[index]
        assert isinstance(layer, RoutedCacheLayer)
        return layer

    def crop(self, max_length: int) -> None:
        """Crop a model that routes nothing; any other refuses, before a layer is changed."""
        for layer in self.layers:
            if isinstance(layer, RoutedCacheLayer):
                layer.crop(max_length)
        super().crop(max_length)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.segments = self.last_position = None

    def knows(self, valid: Tensor) -> Tensor:
        """Whether the past tokens that are not `valid` (B, S) are those that were padding when read, ()."""
        if self.segments is None:
            return valid.all()
        return (valid == (self.segments != NO_SEGMENT)).all()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows, for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # it asks for LongTensor
        change_tensors(self, ("segments", "last_position"), lambda value: value[beam_idx.to(value.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows."""
        super().batch_select_indices(indices)
        change_tensors(self, ("segments", "last_position"), lambda value: value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        super().batch_repeat_interleave(repeats)
        change_tensors(self, ("segments", "last_position"), lambda value: value.repeat_interleave(repeats, 0))


def change_tensors(owner, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    """Put `change` of each of the owner's tensors that exists in its place."""
    for name in names:
        if (value := getattr(owner, name)) is not None:
            setattr(owner, name, change(value))


def row_segments(
    position_ids: Tensor, valid: Tensor | None, cache: RoutedCache | None, ask: bool
) -> Tensor | None:
    """Document number of each past and present token; a new one starts where positions do not go on.

    Args:
        position_ids: of the present tokens, (B, T).
        valid: which of them are not padding, (B, T); None: all.
        cache: gives the past, and is told of the present.
        ask: look whether anything needs document numbers, for which the host waits; else they are given.

    Returns:
        (B, S + T), `NO_SEGMENT` for padding; None where every row is one document without padding.

    Raises:
        ValueError: padding between two tokens of a row, if `ask`.
    """
    past = cache.get_seq_length() if cache is not None else 0
    segments = cache.segments if cache is not None and past else None
    before = cache.last_position if cache is not None and past else position_ids[:, :1] - 1
    assert before is not None
    starts = position_ids != torch.cat([before, position_ids[:, :-1]], dim=1) + 1
    if not ask or segments is not None or valid is not None or starts.any():
        if segments is None:
            segments = position_ids.new_zeros(len(position_ids), past)
        if valid is None:
            valid = torch.ones_like(starts)
        begun = (segments != NO_SEGMENT).any(1, keepdim=True)
        known = torch.cat([segments[:, -1:] != NO_SEGMENT if past else begun, valid[:, :-1]], dim=1)
        first = valid & ~known
        if ask and (begun + first.sum(1, keepdim=True) > 1).any():
            raise ValueError("padding between two tokens of a row: pad on the left to generate")
        number = segments.amax(1, keepdim=True).clamp(min=0) if past else 0
        present = number + (starts & valid).cumsum(1)
        segments = torch.cat([segments, present.masked_fill(~valid, NO_SEGMENT)], dim=1)
    if cache is not None:
        cache.segments, cache.last_position = segments, position_ids[:, -1:]
    return segments
