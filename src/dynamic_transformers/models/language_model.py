"""A routed backbone under the language-model head: Qwen2's, with the auxiliary losses."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import Qwen2ForCausalLM, Qwen2PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache import RoutedCache
from .configuration import CACHE_NAME, RoutedConfig
from .modeling import RoutedModelWithHead, combine_losses, row_shares
from .selection import RoutingResult


@dataclass
class RoutedCausalLMOutput(CausalLMOutputWithPast):
    """Output of the language model, as transformers' own.

    Attributes:
        loss: with labels; in training the language-model loss plus the weighted auxiliary losses.
        logits: (B, T, vocabulary).
        past_key_values, hidden_states: as of the backbone.
        language_model_loss: cross-entropy alone, nats per target token.
        auxiliary_losses: name → mean over routed layers, not weighted, the forward's share of the step's like
            `language_model_loss`; training only.
        routing: layer index → what the routed layer reports.
    """

    language_model_loss: Tensor | None = None
    auxiliary_losses: dict[str, Tensor] | None = None
    routing: dict[int, RoutingResult] | None = None


class RoutedForCausalLM(RoutedModelWithHead, Qwen2ForCausalLM):
    """Language model over a routed backbone."""

    def __init__(self, config: RoutedConfig):
        Qwen2PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *arguments, **options):
        """Refused, for `generate_batch` too: its paged cache has no room for layers that skip tokens."""
        raise ValueError("continuous batching is not available in a model with routed layers; use generate()")

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """What `generate` calls to make its cache: a `RoutedCache`, whose layers are of two kinds."""
        if self.training:
            raise ValueError("generate() needs eval mode: training mode selects among all tokens of a row")
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r}: a routed model's cache is dynamic, leave it out"
            )
        if generation_config.is_assistant or generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "a routed model's cache cannot be cropped; assisted decoding needs a standard model"
            )
        if not self.model.cacheable:
            generation_config.use_cache = False
        elif generation_config.use_cache:
            given = model_kwargs.get(CACHE_NAME)
            if given is None:
                model_kwargs[CACHE_NAME] = RoutedCache(self.config)
            else:
                # As transformers marks it: the caller's cache gets no token that is not returned.
                RoutedCache.of(given, self.config)._is_user_defined = True  # type: ignore[attr-defined]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: RoutedCache | None = None,
        **kwargs,
    ) -> RoutedCausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                output_hidden_states, output_attentions, cache: as in `RoutedModel.forward`.
            labels: (B, T), -100 where there is no target; shifted inside.
            logits_to_keep: as in Qwen2.
            num_items_in_batch: targets of the whole optimizer step, over micro-batches and ranks. All losses
                are then this forward's share of the step's: the sum over the step does not depend on how it
                is cut into micro-batches and ranks. An auxiliary loss is the mean over each row's tokens,
                and rows weigh as much as they have targets.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = language_model_loss = auxiliary = None
        if labels is not None:
            language_model_loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            shares = row_shares(labels[:, 1:] != -100, num_items_in_batch)
            auxiliary, total = combine_losses(outputs.routing, shares)
            loss = language_model_loss + total
        return RoutedCausalLMOutput(
            loss=loss,
            logits=logits,
            language_model_loss=language_model_loss,
            hidden_states=outputs.hidden_states,
            auxiliary_losses=auxiliary,
            routing=outputs.routing,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )
