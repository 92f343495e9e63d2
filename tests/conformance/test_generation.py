"""transformers' own `generate()`: with and without the cache the same text, in every mode."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.models.tiny import (
    ALL,
    ROUTED,
    STAGES,
    calibrated,
    calibrated_case,
    logits,
    short_window,
    tokens,
)

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}


def left_padded(lengths, seed=0):
    ids, mask = torch.full((len(lengths), max(lengths)), 5), torch.zeros(len(lengths), max(lengths)).long()
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = tokens(1, length, seed=seed + row)[0], 1
    return ids, mask


def generate(model, ids, mask, steps, **options):
    torch.manual_seed(0)
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, eos_token_id=None, pad_token_id=0, **options
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", STAGES)
def test_cached_and_uncached_generation_agree_in_left_padded_batches(stage, mode):
    model = calibrated_case(stage)
    ids, mask = left_padded([9, 3, 6])
    options = MODES[mode] | {"return_dict_in_generate": True, "output_logits": True}
    cached = generate(model, ids, mask, 12, use_cache=True, **options)
    plain = generate(model, ids, mask, 12, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    for got, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_generates_what_its_rows_generate_alone(stage):
    model = calibrated_case(stage)
    lengths = [9, 3, 6]
    ids, mask = left_padded(lengths)
    together = generate(model, ids, mask, 10, do_sample=False)
    for row, length in enumerate(lengths):
        alone = ids[row : row + 1, -length:]
        text = generate(model, alone, torch.ones_like(alone), 10, do_sample=False)
        assert torch.equal(text[0], together[row, -length - 10 :])


@pytest.mark.parametrize("architecture", ROUTED)
def test_topk_generates_without_a_cache(architecture):
    model = calibrated(architecture, selection_rule="topk")
    ids = tokens(2, 9)
    text = generate(model, ids, torch.ones_like(ids), 4, do_sample=False)
    for place in range(9, 13):  # among the tokens of each step's row, so not what one forward gives
        assert torch.equal(logits(model, text[:, :place])[:, -1].argmax(-1), text[:, place])


@pytest.mark.parametrize("architecture", ROUTED)
def test_training_mode_does_not_generate(architecture):
    model, ids = calibrated(architecture).train(), tokens(2, 9)
    with pytest.raises(ValueError, match="generate\\(\\) needs eval mode"):
        generate(model, ids, torch.ones_like(ids), 4)


@pytest.mark.parametrize("architecture", ALL)
def test_hidden_states_of_every_layer_come_along(architecture):
    model, ids = calibrated(architecture), tokens(2, 9)
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "do_sample": False}
    steps = generate(model, ids, torch.ones_like(ids), 3, **options)
    assert [len(states) for states in steps.hidden_states] == [model.config.num_hidden_layers + 1] * 3
    whole = model(input_ids=steps.sequences, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(whole[0], model.model.embed_tokens(steps.sequences))
    torch.testing.assert_close(model.lm_head(whole[-1]), logits(model, steps.sequences))
    for first, expected in zip(steps.hidden_states[0], whole, strict=True):
        torch.testing.assert_close(first, expected[:, :9], atol=1e-5, rtol=1e-4)
    assert model(input_ids=ids).hidden_states is None
    if architecture in ROUTED:
        with pytest.raises(ValueError, match="output_attentions: not available"):
            model(input_ids=ids, output_attentions=True)


@pytest.mark.parametrize("architecture", ROUTED)
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_work_is_refused(architecture, attention):
    config = calibrated(architecture).config
    with pytest.raises((ValueError, ImportError), match=r"(?i)attention"):
        AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("stage", STAGES)
def test_long_prompt_then_many_steps(stage):
    model = calibrated_case(stage, **short_window(stage, 16))
    ids = tokens(2, 150)
    text = generate(model, ids, torch.ones_like(ids), 60, do_sample=False)
    following = logits(model, text)[:, 149:-1].argmax(-1)
    assert torch.equal(text[:, 150:], following)


@pytest.mark.parametrize("architecture", ALL)
def test_generation_goes_on_from_a_returned_cache(architecture):
    model = calibrated(architecture)
    ids, mask = left_padded([9, 5])
    whole = generate(model, ids, mask, 14, do_sample=False)
    first = generate(model, ids, mask, 6, do_sample=False, return_dict_in_generate=True)
    assert first.past_key_values.get_seq_length() == 14
    longer = torch.cat([mask, torch.ones(2, 6, dtype=torch.long)], dim=1)
    rest = generate(model, first.sequences, longer, 8, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("architecture", ROUTED)
@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_other_caches_are_refused(architecture, kind):
    model, ids = calibrated(architecture), tokens(1, 5)
    with pytest.raises(ValueError, match="dynamic, leave it out"):
        model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2, cache_implementation=kind))


@pytest.mark.parametrize("architecture", ROUTED)
def test_assisted_decoding_is_refused(architecture):
    model, ids = calibrated(architecture), tokens(1, 5)
    with pytest.raises(ValueError, match="assisted decoding needs a standard model"):
        model.generate(ids, assistant_model=calibrated("standard"), max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="assisted decoding needs a standard model"):
        model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2, do_sample=False)
    with pytest.raises(ValueError, match="assisted decoding needs a standard model"):
        calibrated("standard").generate(ids, assistant_model=model, max_new_tokens=2, do_sample=False)
