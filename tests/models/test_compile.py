"""Training forwards are one graph, compiled once, in which nothing waits for the device."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.models.tiny import ALL, ROUTED, calibrated_case, tiny_model, tokens

PACKED = torch.cat([torch.arange(10), torch.arange(14)]).expand(3, -1)
PADDED = (torch.arange(24) < torch.tensor([[24], [20], [9]])).long()
ROWS = {"plain": {}, "packed": {"position_ids": PACKED}, "padded": {"attention_mask": PADDED}}
# With `targets: threshold` the number of targets is data, and the sparse pass waits for it.
OPTIONS = {
    **{name: (name, {}) for name in ROUTED},
    **{f"{name} by threshold": (name, {"training_rule": "threshold", "at_end": True}) for name in ROUTED},
    **{f"{name} {rule}": (name, {"selection_rule": rule}) for name in ROUTED for rule in ("even", "random")},
    "mod everything": ("mod", {"predictor_weight": 0.01, "aux_weight": 0.01, "z_loss_weight": 0.01}),
    "sdt predictor": ("sdt", {"predictor_weight": 0.01, "surprise_normalize": "moving_average"}),
    "stt dense": ("stt", {"train_output": "dense", "teacher_detach": True}),
}

# What needs a value of a tensor, or how many of its elements are true: on a GPU the host waits for it.
ASK = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__,
    torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.nonzero, torch.nonzero, torch.equal,
    torch.Tensor.equal, torch.Tensor.unique, torch.unique, torch.Tensor.cpu, torch.Tensor.numpy,
    torch.masked_select, torch.Tensor.masked_select, torch.allclose, torch.is_nonzero,
}  # fmt: skip


class HostWaits(TorchFunctionMode):
    """Counts the calls in its body that need a value of a tensor, or how many of its elements are true."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        of_mask = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else [args[1]])
        )
        if function in ASK or of_mask:
            self.calls.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", OPTIONS)
def test_a_training_forward_asks_for_no_value(case, rows, checkpointing):
    architecture, options = OPTIONS[case]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # which have no values to give
        model = tiny_model(architecture, **options)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        inputs = {name: mode.from_tensor(value.clone()) for name, value in ROWS[rows].items()}
        ids = torch.zeros(3, 24, dtype=torch.long)
        with HostWaits() as waits:
            model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
    assert waits.calls == []


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", ["plain", "packed"])
@pytest.mark.parametrize("architecture", ALL)
def test_training_is_one_graph_and_compiled_once(architecture, rows, checkpointing):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    models = [tiny_model(architecture) for _ in range(2)]
    if checkpointing:
        models[1].activation_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(models[1], backend=counter, fullgraph=True)
    for step in range(4):
        ids, losses = tokens(3, 24, seed=step), []
        for model, forward in zip(models, (models[0], compiled), strict=True):
            if architecture in ROUTED:
                model.set_progress(step, 4)
            output = forward(input_ids=ids, labels=ids, use_cache=False, **ROWS[rows])
            output.loss.backward()
            losses.append(output.loss)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
                        parameter.grad = None
            if architecture in ROUTED:
                model.advance()
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_warm_up_is_compiled_for_few_capacities(architecture):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = tiny_model(architecture, capacity=0.25, capacity_warmup_steps=40)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    fractions = []
    for step in range(0, 60, 3):
        model.set_progress(step, 60)
        output = compiled(input_ids=tokens(2, 24), labels=tokens(2, 24), use_cache=False)
        fractions.append(output.routing[1].selected.float().mean().item())
        model.advance()
    assert counter.frame_count <= len(set(fractions)) == 5
    assert fractions == sorted(fractions, reverse=True) and fractions[0] == 1 and fractions[-1] == 0.25


@pytest.mark.parametrize("architecture", ROUTED)
def test_training_by_the_threshold_is_compiled_once_more_after_its_warm_up(architecture):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = tiny_model(architecture, training_rule="threshold")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(20):
        model.set_progress(step, 20)
        ids = tokens(3, 24, seed=step)
        torch.testing.assert_close(
            compiled(input_ids=ids, labels=ids, use_cache=False, **ROWS["packed"]).loss,
            model(input_ids=ids, labels=ids, use_cache=False, **ROWS["packed"]).loss,
        )
        model.advance()
        assert counter.frame_count == (1 if step < 2 else 2)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("case", [*ROUTED, "mod calibrated"])
def test_a_cached_step_waits_once_for_each_routed_layer(case, batch):
    """Whether a layer computes anything is decided on the host, from what the layers below gave."""
    for layers in (4, 8):
        model = calibrated_case(case, num_hidden_layers=layers)
        ids = tokens(batch, 24)
        cache = model(input_ids=ids[:, :12]).past_key_values
        for step in range(12, 24):
            with torch.no_grad(), HostWaits() as waits:
                model(input_ids=ids[:, step : step + 1], past_key_values=cache)
            assert len(waits.calls) <= layers // 2 + 2, waits.calls
