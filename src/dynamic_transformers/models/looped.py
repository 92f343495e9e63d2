"""Looped Qwen2: the middle layers run several times, with the same weights.

The idea is that of the Universal Transformer (Dehghani et al. 2019, arXiv 1807.03819), with a prelude and a
coda that run once (Geiping et al. 2025, arXiv 2502.05171), and without adaptive halting or injected inputs: a
recurrence buys depth and no parameters. One pass is Qwen2.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.cache_utils import Cache

from .carried import CarriedCode
from .configuration import CACHE_NAME


class Qwen2LoopedConfig(Qwen2Config):
    """Qwen2's, plus which layers run how often.

    Attributes:
        num_hidden_layers: that a token passes, each time counted; the cache has keys and values of each.
        distinct_layers: that have weights of their own.
        passes: r, how often the middle layers run. `from_pretrained(folder, passes=3)` changes it.
        prelude, coda: layers before and behind the middle, which run once.
    """

    model_type = "qwen2_looped"

    passes: int = 2
    prelude: int = 1
    coda: int = 1

    def __post_init__(self, distinct_layers: int | None = None, **kwargs):
        if self.passes < 1 or self.prelude < 0 or self.coda < 0:
            raise ValueError(f"passes={self.passes}, prelude={self.prelude}, coda={self.coda}: too few")
        once = self.prelude + self.coda
        repeated = self.num_hidden_layers - once
        self.distinct_layers = distinct_layers or once + repeated // self.passes
        if repeated < self.passes or len(self.schedule) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}: without prelude={self.prelude} and "
                f"coda={self.coda} it must be a multiple of passes={self.passes}"
            )
        super().__post_init__(**kwargs)

    @property
    def schedule(self) -> list[int]:
        """Which layer a token passes first, second, and so on."""
        layers = list(range(self.distinct_layers))
        end = self.distinct_layers - self.coda
        return layers[: self.prelude] + self.passes * layers[self.prelude : end] + layers[end:]


class CacheOfPass:
    """A cache in which a layer that runs again has a place for each time."""

    def __init__(self, cache: Cache, place: int):
        self.cache, self.place = cache, place

    def update(self, keys: Tensor, values: Tensor, layer: int, *arguments, **options):
        """As the cache's, at the place of this pass in place of `layer`'s."""
        return self.cache.update(keys, values, self.place, *arguments, **options)


class Pass:
    """One run of a layer."""

    def __init__(self, layer: nn.Module, place: int):
        self.layer, self.place = layer, place

    def __call__(self, hidden_states: Tensor, **options) -> Tensor:
        """The layer's output, (B, T, D)."""
        if (cache := options.get(CACHE_NAME)) is not None:
            options[CACHE_NAME] = CacheOfPass(cache, self.place)
        return self.layer(hidden_states, **options)


class Loop(nn.ModuleList):
    """The distinct layers; `loop[:depth]`, over which Qwen2's forward runs, are all passes in their order."""

    def __init__(self, layers: Iterable[nn.Module], schedule: list[int]):
        super().__init__(layers)
        self.schedule = schedule

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        layers = list(self)
        return [Pass(layers[layer], place) for place, layer in enumerate(self.schedule)][index]


class Qwen2LoopedModel(CarriedCode, Qwen2Model):
    """Qwen2 backbone whose middle layers run `passes` times."""

    config: Qwen2LoopedConfig

    def __init__(self, config: Qwen2LoopedConfig):
        depth = len(config.schedule)  # of the passes that were asked for when it was loaded
        config.num_hidden_layers = config.distinct_layers
        super().__init__(config)  # as many layers as have weights, initialised as a Qwen2 of this depth
        config.num_hidden_layers, config.layer_types = depth, ["full_attention"] * depth
        self.layers = Loop(self.layers, config.schedule)


class Qwen2LoopedForCausalLM(CarriedCode, Qwen2ForCausalLM):
    """Looped language model."""

    config: Qwen2LoopedConfig

    def __init__(self, config: Qwen2LoopedConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = Qwen2LoopedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *arguments, **options):
        """Refused, for `generate_batch` too: its paged cache has one place for all passes of a layer."""
        raise ValueError("continuous batching is not available in a looped model; use generate()")


class Qwen2LoopedForSequenceClassification(CarriedCode, Qwen2ForSequenceClassification):
    """Looped model under a classifier of whole texts."""

    config: Qwen2LoopedConfig

    def __init__(self, config: Qwen2LoopedConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = Qwen2LoopedModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


Qwen2LoopedConfig.register_for_auto_class()
