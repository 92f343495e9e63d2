"""The analytic account against torch's own count on the real modules."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamic_transformers.configure import compose_settings
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.state import RoutingState
from dynamic_transformers.settings import ModelSettings
from dynamic_transformers.training.budget import Budget, Horizon, Progress
from dynamic_transformers.training.build import model_config
from dynamic_transformers.training.calibration import calibrate
from dynamic_transformers.training.flops import (
    block_flops,
    calibration_flops,
    forward_flops,
    training_flops,
)
from dynamic_transformers.training.realised import SelectionCounts, Spread
from tests.models.tiny import ALL, ROUTED

LENGTH, ROWS, VOCAB = 128, 2, 211
CASES = [
    *((name, {}) for name in ALL),
    *((name, {"training_rule": "threshold", "capacity": 0.25}) for name in ROUTED),
    *((name, {"selection_rule": "even"}) for name in ROUTED),
    ("mod", {"capacity": 0.5, "predictor_weight": 0.01, "selection_rule": "predictor"}),
    ("sdt", {"predictor_weight": 0.01, "prior_factor": 0.5}),
    ("stt", {"teacher_detach": True}),
    ("stt", {"train_output": "dense"}),
    ("stt", {"targets": "threshold", "target_threshold": 0.6}),
]


def build(architecture, options):
    torch.manual_seed(0)
    record = ARCHITECTURES[architecture]
    backbone = dict(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    values = record.configuration(backbone, ModelSettings()).to_dict()
    config = record.config_class.from_dict(values | options)
    # torch does not count the fused CPU kernel; eager attention is plain matrix products.
    config._attn_implementation = "eager"
    return record.model_class(config)


def computed(outputs):
    return {i: r.computed for i, r in (getattr(outputs, "routing", None) or {}).items()}


def fractions(outputs):
    return {i: r.selected.float().mean().item() for i, r in (getattr(outputs, "routing", None) or {}).items()}


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_forward_and_training_flops_agree_within_one_percent(architecture, options):
    model = build(architecture, options)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
    if architecture in ROUTED:
        model.set_progress(5, 10)  # past the warm-up of the training rule
        model(input_ids=ids, use_cache=False)
        model.advance()
    with FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
        outputs.loss.backward()
    counted = counter.get_total_flops() / ids.numel()
    expected = training_flops(model.config, LENGTH, computed(outputs)).total()
    assert expected == pytest.approx(counted, rel=0.01)
    if options.get("training_rule") == "threshold":  # all places of the bound are computed, in use or not
        assert set(computed(outputs).values()) == {0.375} and computed(outputs) != fractions(outputs)
        assert expected == training_flops(model.config, LENGTH).total()
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # One row: the widest of several ragged rows would be counted for all.
        outputs = model(input_ids=ids[:1], use_cache=False)
    expected = forward_flops(model.config, LENGTH, fractions(outputs)).total()
    assert expected == pytest.approx(counter.get_total_flops() / LENGTH, rel=0.01)


def ragged_rows(model):
    """What `model` selects of rows of 128, 64 and 32 tokens, padded, and which tokens are valid."""
    lengths = torch.tensor([LENGTH, LENGTH // 2, LENGTH // 4])
    valid = torch.arange(LENGTH) < lengths.unsqueeze(1)
    ids = torch.randint(0, VOCAB, valid.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = model.eval()(input_ids=ids, attention_mask=valid.long(), use_cache=False)
    routing = getattr(outputs, "routing", None) or {}
    return ids, valid, {layer: result.selected for layer, result in routing.items()}


def uneven(architecture):
    """A model whose thresholds were set by other text, so that rows differ in what they select."""
    model = build(architecture, {"capacity": 0.5} if architecture in ROUTED else {})
    if architecture in ROUTED:
        ids = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
        calibrate(model, [{"input_ids": ids, "position_ids": torch.arange(LENGTH).expand(4, -1)}])
    return model


@pytest.mark.parametrize("architecture", ALL)
def test_flops_of_ragged_rows_are_those_of_each_row_alone(architecture):
    model = uneven(architecture)
    ids, valid, selected = ragged_rows(model)
    counts = SelectionCounts()
    counts.add(selected, valid)
    counted = 0
    for row, length in zip(ids, valid.sum(1).tolist(), strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=row[None, :length], use_cache=False)
        counted += counter.get_total_flops()
    realised = counts.realised(model.config)
    assert realised.tokens == valid.sum()
    assert realised.forward_flops_per_token == pytest.approx(counted / int(valid.sum()), rel=1e-3)


def test_scores_are_the_pairs_of_computed_tokens_of_each_row():
    """Rows of very different fractions, and domains within rows, against pairs counted one by one."""
    config = build("mod", {"capacity": 0.5}).config
    generator = torch.Generator().manual_seed(3)
    valid = torch.arange(LENGTH) < torch.tensor([LENGTH, 100, 61, 7]).unsqueeze(1)
    domains = torch.randint(0, 2, valid.shape, generator=generator)
    shares = torch.tensor([0.9, 0.02, 0.5, 0.0]).unsqueeze(1)
    selected = {
        layer: (torch.rand(valid.shape, generator=generator) < shares) & valid
        for layer in config.routed_layers
    }
    dense = [layer for layer in range(config.num_hidden_layers) if layer not in selected]
    counts = SelectionCounts(2)
    counts.add(selected, valid, domains)

    def pairs(domain):
        """Of tokens of a domain with the tokens of their row, where a layer computes both."""
        found = 0
        for row in range(len(valid)):
            for mask in [*(selected[layer][row] for layer in selected), *[valid[row]] * len(dense)]:
                computed = mask.nonzero().flatten().tolist()
                found += sum(domains[row, query] == domain for query in computed for _ in computed)
        return int(found)

    per_pair = 4 * config.hidden_size  # a product of queries and keys, one of weights and values
    linear = forward_flops(config, 0, dict.fromkeys(selected, 1.0), dict.fromkeys(selected, 0.0))
    for domain in (0, 1):
        of = valid & (domains == domain)
        skipped = sum(int((of & ~mask).sum()) for mask in selected.values())
        block = block_flops(config, 0).total()
        expected = linear.total() * int(of.sum()) - block * skipped + per_pair * pairs(domain)
        realised = counts.realised(config, domain)
        assert realised.tokens == of.sum()
        assert realised.forward_flops_per_token * realised.tokens == pytest.approx(expected, rel=1e-9)
    parts = [counts.realised(config, domain) for domain in (0, 1)]
    whole = counts.realised(config)
    total = sum(part.forward_flops_per_token * part.tokens for part in parts)
    assert whole.forward_flops_per_token * whole.tokens == pytest.approx(total, rel=1e-9)


def test_the_spread_is_that_of_the_rows():
    config = build("mod", {"capacity": 0.5}).config
    valid = torch.ones(2, 8, dtype=torch.bool)
    first, *others = config.routed_layers
    selected = {first: torch.tensor([[True] * 2 + [False] * 6, [True] * 6 + [False] * 2])}
    selected |= {layer: torch.tensor([[True] * 4 + [False] * 4] * 2) for layer in others}
    counts = SelectionCounts()
    counts.add(selected, valid)
    realised = counts.realised(config)
    assert realised.layers == {first: Spread(0.5, 0.25)} | {layer: Spread(0.5, 0.0) for layer in others}
    assert realised.fraction == Spread(0.5, pytest.approx(0.25 / len(selected)))


@pytest.mark.parametrize("architecture", ALL)
def test_flops_of_cached_steps_agree_within_one_percent(architecture):
    model = build(architecture, {"capacity": 0.5} if architecture in ROUTED else {})
    ids = torch.randint(0, VOCAB, (1, LENGTH + 16), generator=torch.Generator().manual_seed(0))
    if architecture in ROUTED:
        calibrate(model, [{"input_ids": ids, "position_ids": torch.arange(LENGTH + 16).unsqueeze(0)}])
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:, :LENGTH], use_cache=True).past_key_values
        for length in range(LENGTH + 1, LENGTH + 17):
            with FlopCounterMode(display=False) as counter:
                step = model(input_ids=ids[:, length - 1 : length], past_key_values=cache, use_cache=True)
            selected = fractions(step)
            held = {layer: len(cache.routed(layer).keys) for layer in selected}
            expected = forward_flops(model.config, length, selected, held).total()
            assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert architecture not in ROUTED or len(set(selected.values()) | {0.0, 1.0}) == 2


@pytest.mark.parametrize(("capacity", "linear", "scores"), [(0.5, 0.75, 0.625), (0.125, 0.5625, 0.508)])
def test_ratios_of_the_specification(capacity, linear, scores):
    config = ARCHITECTURES["mod"].config_class(num_hidden_layers=24, capacity=capacity)
    dense = ARCHITECTURES["standard"].config_class(num_hidden_layers=24)
    routed, full = forward_flops(config, 2048), forward_flops(dense, 2048)
    assert routed["mlp"] / full["mlp"] == pytest.approx(linear, abs=1e-3)
    assert routed["qkvo"] / full["qkvo"] == pytest.approx(linear, abs=1e-3)
    assert routed["scores"] / full["scores"] == pytest.approx(scores, abs=1e-3)


@pytest.mark.parametrize("overrides", [[], ["model.training_rule=threshold"]], ids=["topk", "threshold"])
def test_the_papers_configuration_gives_each_architecture_equal_flops(overrides):
    """Every step is charged, those of the warm-ups too; Qwen2.5-0.5B has the dimensions of our 0.5b."""
    spent = {}
    for architecture in ARCHITECTURES:
        settings = compose_settings("paper", [f"model.type={architecture}", *overrides])
        config = model_config(dataclasses.replace(settings.model, size="0.5b", pretrained=None), 151936)
        budget, data = Budget.from_settings(settings.training), settings.data
        tokens = data.batch_size * settings.training.gradient_accumulation_steps * data.block_size
        horizon, done = Horizon(budget, budget, config, tokens, data.block_size), Progress()
        state = RoutingState(config) if architecture in ROUTED else None
        while done.step < (total := horizon.total_steps(done)):
            places = {}
            if state is not None:
                state.set_progress(done.step, total)
                by_threshold = state.training_rule == "threshold"
                fraction = config.training_fraction if by_threshold else state.training_capacity
                places = dict.fromkeys(config.routed_layers, fraction)
            done.flops += horizon.step_flops(places)
            done.tokens += tokens
            done.step += 1
        assert done.step > 500  # after which the capacity's warm-up is over
        spent[architecture] = done.flops
    assert max(spent.values()) / min(spent.values()) < 1.02, spent
    assert spent["standard"] == pytest.approx(3.228e17, rel=0.02)  # 1e8 tokens of the standard model


def test_stt_training_costs_more_than_dense():
    config = ARCHITECTURES["stt"].config_class(num_hidden_layers=24)
    dense = ARCHITECTURES["standard"].config_class(num_hidden_layers=24)
    assert training_flops(config, 1024).total() > training_flops(dense, 1024).total()
    assert forward_flops(config, 1024).total() < forward_flops(dense, 1024).total()


def test_a_layer_that_computes_nothing_costs_its_router_alone():
    config = ARCHITECTURES["mod"].config_class(num_hidden_layers=4)
    nothing, all_of_it = (calibration_flops(config, 128, {1: fraction, 3: 0.5}) for fraction in (0.0, 1.0))
    assert all_of_it.total() - nothing.total() == pytest.approx(block_flops(config, 128).total())
    assert nothing["router"] == all_of_it["router"]
