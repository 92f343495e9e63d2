"""Gradient checkpointing: what a training forward keeps for its backward, and that it learns the same."""

import pytest
import torch

from tests.models.tiny import ALL, ROUTED, tiny_model, tokens
from tests.training.live_bytes import LiveBytes

SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8}
MOST = 1.02  # times what the standard model keeps; 1.10 where routers are not checkpointed


def kept(architecture: str, checkpointing: bool) -> int:
    """Bytes that the loss holds, after the outputs have gone."""
    model = tiny_model(architecture, **SIZE)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if architecture in ROUTED:
        model.set_progress(0, 10)
    ids = tokens(4, 128)
    with LiveBytes() as memory:
        hidden_states = model.model(input_ids=ids, use_cache=False)
        live = hidden_states.last_hidden_state.sum()
        if architecture in ROUTED:
            live = live + sum(
                loss.sum() for result in hidden_states.routing.values() for _, loss in result.losses.values()
            )
        del hidden_states
        return memory.live


@pytest.mark.parametrize("architecture", ALL)
def test_a_checkpointed_model_keeps_about_as_much_as_a_standard_one(architecture):
    assert kept(architecture, True) <= MOST * kept("standard", True)
    assert kept("standard", False) > 3 * kept("standard", True)  # that much is at stake


@pytest.mark.parametrize(
    "options", [{}, {"selection_rule": "random"}, {"training_rule": "threshold"}], ids=str
)
@pytest.mark.parametrize("architecture", ROUTED)
def test_a_checkpointed_model_learns_the_same(architecture, options):
    models = [tiny_model(architecture, **options) for _ in range(2)]
    models[1].activation_checkpointing_enable({"use_reentrant": False})
    for model in models:
        model.set_progress(5, 10)
        torch.manual_seed(1)
        model(input_ids=tokens(2, 24), labels=tokens(2, 24), use_cache=False).loss.backward()
        model.advance()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=0, rtol=0, msg=name)
    thresholds = [model.routing_state.thresholds for model in models]
    assert torch.equal(*thresholds) and thresholds[0].any()


def test_reentrant_checkpoints_are_refused():
    with pytest.raises(ValueError, match="needs use_reentrant=False"):
        tiny_model("sdt").activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("every", [1, 2, 3])
def test_each_layer_is_checkpointed_once(every):
    model, standard = tiny_model("mod", num_hidden_layers=6), tiny_model("standard", num_hidden_layers=6)
    for one in (model, standard):
        one.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    flags = [layer.gradient_checkpointing for layer in standard.model.layers]
    for index, layer in enumerate(model.model.layers):
        router = dict(model.model.routers.items()).get(str(index))
        assert (layer.gradient_checkpointing, getattr(router, "gradient_checkpointing", None)) == (
            (flags[index], None) if router is None else (False, flags[index])
        )
    model.activation_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
