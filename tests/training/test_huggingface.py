"""Our models in Hugging Face's Trainer, loaded as any user loads them."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from dynamic_transformers.settings import OptimizerSettings
from dynamic_transformers.training.calibration import calibrate
from dynamic_transformers.training.huggingface import RoutingCallback, whole
from dynamic_transformers.training.optimizer import build_optimizer
from dynamic_transformers.training.step import OptimizerStep
from tests.models.tiny import ALL, ROUTED, tiny_model, tokens

LENGTHS = (40, 40, 25, 40, 11, 40, 40, 7)


def rows():
    """Rows of several lengths, padded on the right, the first half of each without targets."""
    result = []
    for seed, length in enumerate(LENGTHS):
        ids = tokens(1, 40, seed=seed)[0]
        mask = (torch.arange(40) < length).long()
        labels = ids.masked_fill(mask == 0, -100)
        labels[: length // 2] = -100
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


def arguments(folder, **options):
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), logging_strategy="no", **quiet | options)


@pytest.fixture
def exported(tmp_path, request):
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    return lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)


@pytest.mark.parametrize("exported", ALL, indirect=True)
def test_gradients_do_not_depend_on_how_a_step_is_cut(exported, tmp_path):
    def gradients(batch, accumulation):
        found = {}

        class Watched(Trainer):
            def training_step(self, model, *rest, **more):
                loss = super().training_step(model, *rest, **more)
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                return loss

        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = Watched(exported(), arguments(tmp_path, max_steps=1, **options), train_dataset=rows())
        trainer.train()
        return found

    one, eight = gradients(8, 1), gradients(1, 8)
    assert one.keys() == eight.keys()
    for name, value in one.items():
        torch.testing.assert_close(eight[name], value, atol=1e-5, rtol=1e-3, msg=name)


def test_what_fsdp_sharded_is_sharded_again_after_an_error(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ZeroDivisionError), whole(model):
            assert not isinstance(model.weight, DTensor)
            raise ZeroDivisionError
        assert isinstance(model.weight, DTensor)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("exported", ALL, indirect=True)
def test_evaluation_gives_metrics_the_logits(exported, tmp_path):
    def count(prediction):
        return {"seen": float(prediction.predictions.shape[-1])}

    trainer = Trainer(exported(), arguments(tmp_path), eval_dataset=rows(), compute_metrics=count)
    assert trainer.evaluate()["eval_seen"] == 97


@pytest.mark.parametrize("architecture", ROUTED)
def test_the_callback_does_what_our_loop_does(architecture, tmp_path):
    """The same rows in the same order at a learning rate of 0: equal schedules, averages and calibration."""
    ids = tokens(12, 32)
    held_out = [{"input_ids": tokens(64, 32, seed=9), "position_ids": torch.arange(32).expand(64, -1)}]
    ours = tiny_model(architecture, capacity_warmup_steps=2)
    theirs = {calibrated: copy.deepcopy(ours) for calibrated in (False, True)}
    batches = ({"input_ids": row, "labels": row} for row in ids.split(2))
    optimizer = build_optimizer(ours, OptimizerSettings(lr=0.0))
    step = OptimizerStep(Accelerator(cpu=True), ours, optimizer, batches, OptimizerSettings(lr=0.0), 2, 0)
    for number in range(3):
        step(number, 3, list)
    for calibrated, model in theirs.items():
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
        Trainer(
            model,
            arguments(tmp_path, learning_rate=0.0, train_sampling_strategy="sequential", **options),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[RoutingCallback(held_out if calibrated else None)],
        ).train()
        if calibrated:
            calibrate(ours, held_out)
        for name, value in ours.routing_state.named_buffers():
            assert torch.equal(model.routing_state.get_buffer(name), value), name
    assert ours.routing_state.thresholds[0].all()


@pytest.mark.parametrize("callbacks", [[], [RoutingCallback()]], ids=["nobody", "callback"])
def test_a_routed_model_whose_schedules_nobody_moves_says_so_once(callbacks, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Trainer(
            tiny_model("sdt"),
            arguments(tmp_path, max_steps=15, per_device_train_batch_size=2),
            train_dataset=rows(),
            callbacks=callbacks,
        ).train()
    told = [str(each.message) for each in seen if "nobody moves" in str(each.message)]
    assert len(told) == (0 if callbacks else 1)


@pytest.mark.parametrize("batch", [{"ids": 3}, torch.ones(2, 8), {"input_ids": torch.ones(8)}])
def test_batches_of_another_form_are_refused_before_training(batch):
    with pytest.raises(TypeError, match="a mapping with input_ids"):
        RoutingCallback([batch])


def test_a_row_without_positions_is_one_document():
    (batch,) = RoutingCallback([{"input_ids": torch.ones(2, 3, dtype=torch.long)}]).batches
    assert batch["position_ids"].tolist() == [[0, 1, 2]] * 2
