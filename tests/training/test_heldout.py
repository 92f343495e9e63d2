"""Held-out loss and bits per byte, token by token; its domains; its memory."""

import math

import pytest
import torch
from live_bytes import LiveBytes

from dynamic_transformers.data.loading import domains_of, load_split, source_names
from dynamic_transformers.data.prepare import prepare
from dynamic_transformers.training.build import build_model
from dynamic_transformers.training.heldout import evaluate_heldout
from tests.models.tiny import ALL, ROUTED


@pytest.mark.parametrize("architecture", ALL)
@torch.no_grad()
def test_loss_is_the_mean_over_targets_and_bits_count_predicted_bytes(architecture, make_settings, data_dir):
    split = load_split(data_dir, "validation")
    model = build_model(make_settings(architecture), 300)
    result = evaluate_heldout(model, split, batch_size=3)
    assert model.training
    model.eval()
    nats = targets = 0
    for place in range(len(split)):
        ids, positions, _ = split.batch([place]).values()
        probabilities = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
        )
        for place in range(1, ids.shape[1]):
            if positions[0, place] != 0:  # the first token of a document has nothing to be predicted from
                nats -= probabilities[place - 1, ids[0, place]].item()
                targets += 1
    assert result.loss == pytest.approx(nats / targets, rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / split.num_bytes, rel=1e-4)


@pytest.fixture(scope="module")
def two_sources(make_settings, tmp_path_factory):
    sources = [{"name": name, "path": "embedded", "max_documents": 200} for name in ("math", "code")]
    settings = make_settings(data={"dataset_configs": sources, "max_tokens": 8000, "max_eval_tokens": 2000})
    return prepare(settings, tmp_path_factory.mktemp("data") / "two")


@pytest.mark.parametrize("architecture", ALL)
@torch.no_grad()
def test_domains_are_the_tokens_of_each_source(architecture, make_settings, two_sources):
    split, names = load_split(two_sources, "test"), source_names(two_sources)
    model = build_model(make_settings(architecture), 300).eval()
    result = evaluate_heldout(model, split, 3, names)
    assert list(result.domains) == names == ["math", "code"]
    ids, positions, _ = split.batch(range(len(split))).values()
    sources = domains_of(split)
    outputs = model(input_ids=ids, position_ids=positions, use_cache=False)
    losses = -outputs.logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    for number, name in enumerate(names):
        domain = result.domains[name]
        of = sources == number
        targets = of[:, 1:] & (positions[:, 1:] != 0)
        assert domain.loss == pytest.approx(losses[targets].mean().item(), rel=1e-4)
        assert domain.realised.tokens == of.sum()
        for layer, spread in domain.realised.layers.items():
            selected = outputs.routing[layer].selected
            assert spread.mean == pytest.approx(selected[of].double().mean().item())
    parts = [domain.realised for domain in result.domains.values()]
    total = sum(part.forward_flops_per_token * part.tokens for part in parts)
    assert result.realised.forward_flops_per_token * ids.numel() == pytest.approx(total)
    assert (architecture in ROUTED) == (result.realised.fraction is not None)


@pytest.mark.parametrize("architecture", ALL)
def test_logits_of_a_batch_are_never_whole(architecture, make_settings, data_dir):
    split = load_split(data_dir, "test").select(range(20))
    vocabulary = 2**17
    model = build_model(make_settings(architecture), vocabulary)
    with LiveBytes() as live:
        evaluate_heldout(model, split, len(split))
    assert live.peak < 4 * vocabulary * len(split) * 32 / 2
