"""Parameter groups and the schedule."""

import pytest

from dynamic_transformers.settings import OptimizerSettings
from dynamic_transformers.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from tests.models.tiny import ALL, PREDICTOR, tiny_model

SETTINGS = OptimizerSettings(
    lr=1e-3,
    router_lr_multiplier=2.0,
    prior_lr_multiplier=3.0,
    surprise_lr_multiplier=4.0,
    predictor_lr_multiplier=5.0,
)
MULTIPLIERS = {
    "embed_tokens": 1,
    "layers": 1,
    "router.": 2,
    "prior": 3,
    "surprise": 4,
    "predictor": 5,
    "student": 5,
}


@pytest.mark.parametrize("architecture", ALL)
def test_every_parameter_has_its_rate_and_only_matrices_decay(architecture):
    model = tiny_model(architecture, **PREDICTOR.get(architecture, {}))
    optimizer = build_optimizer(model, SETTINGS)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        local = name.split(".routers.")[-1] if ".routers." in name else name
        (multiplier,) = {value for part, value in MULTIPLIERS.items() if part in local} or {1}
        assert groups[id(parameter)]["lr"] == pytest.approx(1e-3 * multiplier), name
        assert groups[id(parameter)]["weight_decay"] == (0.01 if parameter.ndim >= 2 else 0), name
    set_learning_rate(optimizer, 0.5)
    assert all(group["lr"] == pytest.approx(0.5 * group["base_lr"]) for group in optimizer.param_groups)


def test_warm_up_then_cosine_to_the_end():
    settings = OptimizerSettings(warmup_fraction=0.1, min_lr_fraction=0.2)
    factors = [learning_rate_factor(settings, step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)
