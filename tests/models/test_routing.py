"""Selection, skipping and calibration."""

import pytest
import torch

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.selection import (
    capacities_to_tokens,
    capacity_to_tokens,
    score_quantile,
    select_mask,
    select_top_k,
)
from dynamic_transformers.models.state import RoutingState
from tests.models.tiny import (
    ALL,
    PREDICTOR,
    ROUTED,
    ROUTED_STAGES,
    calibrated,
    calibrated_case,
    logits,
    tiny_model,
    tokens,
)


def test_top_k_is_ascending_and_holds_the_best():
    scores = torch.rand(3, 20)
    selection = select_top_k(scores, 0.3, None)
    assert selection.indices.shape == (3, 6) and selection.valid is None
    assert (selection.indices.diff(dim=1) > 0).all()
    for row in range(3):
        assert set(selection.indices[row].tolist()) == set(scores[row].topk(6).indices.tolist())


def test_padding_never_competes_and_k_counts_valid_tokens():
    scores = torch.rand(3, 20)
    valid = torch.ones(3, 20, dtype=torch.bool)
    valid[0, :10] = False
    valid[1, 4:] = False
    scores[~valid] = 100.0
    selection = select_top_k(scores, 0.5, valid)
    mask = selection.mask
    assert mask.sum(1).tolist() == [5, 2, 10]
    assert not (mask & ~valid).any()
    assert mask[0].nonzero().flatten().tolist() == sorted((10 + scores[0, 10:].topk(5).indices).tolist())


@pytest.mark.parametrize(
    ("capacity", "n", "k"), [(0.29, 100, 29), (0.125, 7, 1), (0.5, 1, 1), (1.0, 5, 5), (0.3, 10, 3)]
)
def test_k_is_the_floor_and_at_least_one(capacity, n, k):
    assert capacity_to_tokens(capacity, n) == int(capacities_to_tokens(capacity, torch.tensor(n))) == k


def test_mask_and_selection_are_inverse():
    torch.manual_seed(0)  # rows of different numbers
    mask = torch.rand(4, 13) > 0.6
    mask[2] = False
    assert torch.equal(select_mask(mask).mask, mask)
    assert select_mask(torch.zeros(2, 5, dtype=torch.bool)).indices.numel() == 0
    single = select_mask(mask[:1])
    assert single.valid is None and torch.equal(single.indices[0], mask[0].nonzero().flatten())
    places = torch.zeros_like(mask)
    selection = select_mask(mask)
    assert selection.rows.tolist() == [0, 1, 3]
    for place, row in enumerate(selection.rows):
        places[row, selection.indices[place][selection.valid[place]]] = True
    assert torch.equal(places, mask)


def state_of_one_layer() -> RoutingState:
    return tiny_model("mod", num_hidden_layers=2).routing_state


def noted(state: RoutingState, scores: torch.Tensor, fraction: float, valid=None) -> None:
    """Note what a forward with these scores would, of a layer without a predictor."""
    quantile = score_quantile(scores, fraction, valid)
    state.note(torch.stack([quantile, torch.full_like(quantile, torch.nan)]).unsqueeze(1))


@pytest.mark.parametrize("fraction", [0.0, 0.125, 0.3, 1.0])
@pytest.mark.parametrize("padding", [0, 7, 49])
def test_score_quantile_is_that_of_the_valid_tokens(fraction, padding):
    scores = torch.randn(4, 50)
    valid = torch.ones(4, 50, dtype=torch.bool)
    valid[:, :padding] = False
    expected = scores[:, padding:].quantile(1 - fraction)
    torch.testing.assert_close(score_quantile(scores, fraction, valid), expected)
    torch.testing.assert_close(score_quantile(scores[:, padding:], torch.tensor(fraction), None), expected)


def test_threshold_is_the_bias_corrected_average_of_the_steps_quantiles():
    state = state_of_one_layer()
    average = weight = 0.0
    for step in range(6):
        decay = 0.99 if step < 3 else 0.9
        if step == 3:
            state.set_progress(0, 80)  # a run too short for the decay that was asked for
        scores = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(step))
        valid = torch.ones(4, 50, dtype=torch.bool)
        valid[:, :7] = False
        for forward in scores:
            noted(state, forward.masked_fill(~valid, 1e6), 0.25, valid)
        before = state.thresholds.clone()
        noted(state, torch.randn(4, 50), 0.25, torch.zeros_like(valid))  # padding alone counts for nothing
        assert torch.equal(state.thresholds, before)  # a forward moves nothing
        state.advance()
        quantile = sum(forward[:, 7:].flatten().quantile(0.75).item() for forward in scores) / 2
        average = decay * average + (1 - decay) * quantile
        weight = decay * weight + (1 - decay)
        assert state.thresholds[0, 0].item() == pytest.approx(average / weight, rel=1e-4)
        assert state.thresholds[1, 0] == state.weights[1, 0] == 0  # of a predictor that there is not
        noted(state, torch.randn(4, 50), 0.25)
        before = state.thresholds.clone()
        state.advance(keep=False)  # a step without an update
        state.advance()  # without a forward
        assert torch.equal(state.thresholds, before)


def test_threshold_holds_the_fraction_at_capacity():
    state = state_of_one_layer()
    for step in range(50):
        noted(state, torch.randn(8, 128, generator=torch.Generator().manual_seed(step)), 0.125)
        state.advance()
    fresh = torch.randn(8, 1024, generator=torch.Generator().manual_seed(99))
    assert (fresh > state.thresholds[0, 0]).float().mean().item() == pytest.approx(0.125, abs=0.02)


@pytest.mark.parametrize("case", [*ROUTED_STAGES, "mod raw gate"])
def test_routed_layer_equals_the_formula(case):
    """y = x + g·(F(x̃) − x̃) for the selected tokens run alone at their positions, y = x for the others."""
    model = calibrated_case(case)
    layer = model.config.routed_layers[0]
    captured = {}
    router = model.model.routers[str(layer)]
    router.register_forward_hook(
        lambda _, inputs, output: captured.update(x=inputs[1], y=output[0], result=output[1])
    )
    ids = tokens(1, 24)
    model(input_ids=ids, use_cache=False)
    x, y, result = captured["x"], captured["y"], captured["result"]
    places = result.selected[0].nonzero().flatten()
    positions = places.unsqueeze(0)
    alone = model.model.layers[layer](
        x[:, places], position_ids=positions, position_embeddings=model.model.rotary_emb(x, positions)
    )
    expected = x.clone()
    expected[:, places] += result.gate[:, places].unsqueeze(-1) * (alone - x[:, places])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    odds = result.score.exp()
    if case.startswith("sdt"):
        odds = 3 * (model.routing_state.beta * result.score).exp()
    gate = result.score if case == "mod raw gate" else odds / (1 + odds)
    torch.testing.assert_close(result.gate, gate, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, PREDICTOR.get(name, {})) for name in ALL),
        ("mod", {}),
        ("mod", {"predictor_weight": 0.01, "aux_weight": 0.01}),
        ("stt", {"targets": "threshold", "target_threshold": 0.5}),
        ("stt", {"teacher_detach": True}),
    ],
)
def test_every_parameter_learns(architecture, options):
    model = tiny_model(architecture, **options)
    ids = tokens(2, 24)
    model(input_ids=ids, labels=ids).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize(
    ("architecture", "options", "weights"),
    [
        (
            "stt",
            {"targets": "threshold", "target_threshold": 0.5},
            {"prior": 0.05, "student": 0.01, "gate_mean": 0.001},
        ),
        ("sdt", {"predictor_weight": 0.02}, {"prior": 0.05, "predictor": 0.02}),
        (
            "mod",
            {"predictor_weight": 0.02, "aux_weight": 0.03, "z_loss_weight": 1e-3},
            {"predictor": 0.02, "aux": 0.03, "z": 1e-3},
        ),
    ],
)
def test_auxiliary_losses_reach_the_loss_with_their_weight(architecture, options, weights):
    ids = tokens(2, 24)
    model = tiny_model(architecture, **options)
    out = model(input_ids=ids, labels=ids)
    assert set(out.auxiliary_losses) == set(weights)
    expected = out.language_model_loss + sum(w * out.auxiliary_losses[name] for name, w in weights.items())
    torch.testing.assert_close(out.loss, expected)
    model.eval()
    assert torch.equal(
        model(input_ids=ids, labels=ids).loss, model(input_ids=ids, labels=ids).language_model_loss
    )


def test_z_loss_is_the_mean_square_of_the_router_logits():
    model = tiny_model("mod", num_hidden_layers=2, z_loss_weight=1.0)
    inputs = []
    model.model.routers["1"].register_forward_pre_hook(lambda _, args: inputs.append(args[1]))
    ids = tokens(2, 24)
    losses = model(input_ids=ids, labels=ids).auxiliary_losses
    logits = inputs[0] @ model.model.routers["1"].router.weight[0]
    torch.testing.assert_close(losses["z"], logits.square().mean())


@pytest.mark.parametrize("architecture", ROUTED)
def test_capacity_warms_up_from_all_tokens(architecture):
    model = tiny_model(architecture, capacity=0.25, capacity_warmup_steps=4)
    ids = tokens(2, 24)
    for step, expected in ((0, 24), (2, 15), (4, 6), (9, 6)):
        model.set_progress(step, 10)
        assert (model(input_ids=ids).routing[1].selected.sum(1) == expected).all()


def test_predictor_and_student_send_no_gradient_to_the_language_model():
    for architecture, options in PREDICTOR.items():
        model = tiny_model(architecture, **options)
        ids = tokens(2, 24)
        parts = ARCHITECTURES[architecture].parts
        (loss_name,) = (part for part, kind in parts.items() if kind == "predictor")
        model(input_ids=ids, labels=ids).auxiliary_losses[loss_name].backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched and all("predictor" in name or "student" in name for name in touched), touched


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mod", {"selection_rule": "predictor"}),
        ("mod", {"selection_rule": "aux"}),
        ("mod", {"selection_rule": "best"}),
        ("sdt", {"selection_rule": "aux"}),
        ("sdt", {"selection_rule": "calibrated_predictor"}),
        ("stt", {"selection_rule": "aux"}),
        ("stt", {"predictor_weight": 0.01}),
        ("stt", {"selection_rule": "calibrated_predictor"}),
    ],
)
def test_a_rule_that_the_model_cannot_follow_is_refused(architecture, options):
    with pytest.raises(ValueError, match=r"selection_rule=|predictor_weight"):
        tiny_model(architecture, **options)
    model = calibrated(architecture)
    if "selection_rule" in options:  # changed behind its back
        model.config.selection_rule = options["selection_rule"]
        with pytest.raises(ValueError, match="this model knows threshold"):
            model(input_ids=tokens(1, 8))


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_training_rule_that_does_not_exist_is_refused(architecture):
    with pytest.raises(ValueError, match="training_rule='treshold': give topk or threshold"):
        tiny_model(architecture, training_rule="treshold")


@pytest.mark.parametrize("architecture", ROUTED)
@pytest.mark.parametrize("rule", ["predictor", "even", "random", "topk"])
def test_training_by_a_threshold_needs_a_threshold_in_evaluation(architecture, rule):
    """Evaluation by another rule, to compare, needs none."""
    options = PREDICTOR[architecture] if rule == "predictor" else {}
    model = tiny_model(architecture, selection_rule=rule, training_rule="threshold", **options)
    with pytest.raises(ValueError, match=f"needs selection_rule='threshold', not '{rule}'"):
        model(input_ids=tokens(1, 8))
    assert logits(model.eval(), tokens(1, 8)).isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_stt_threshold_targets_of_a_row_do_not_depend_on_its_mates(padded):
    model = calibrated("stt", targets="threshold", target_threshold=0.99999).train()
    ids = tokens(3, 16)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions).routing[1].selected
    assert (together & mask.bool()).any(1).all()
    for row in range(3):
        alone = model(
            input_ids=ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            position_ids=positions[row : row + 1],
        )
        assert torch.equal(alone.routing[1].selected[0], together[row])
