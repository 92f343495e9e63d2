"""Offload, quantisation, FSDP2, resized embeddings and copies leave a model what it is."""

import copy
import datetime
import inspect
import json

import pytest
import torch
from accelerate import cpu_offload
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.heads import Predictor, ScoreHead
from dynamic_transformers.models.surprise import SurpriseGate
from dynamic_transformers.training.huggingface import RoutingCallback
from tests.models.tiny import (
    ALL,
    BACKBONE,
    CASES,
    DENSE,
    PREDICTOR,
    ROUTED,
    VOCAB,
    calibrated,
    calibrated_case,
    logits,
    tiny_model,
    tokens,
)

BATCH = {"input_ids": tokens(4, 24, seed=3), "position_ids": torch.arange(24).expand(4, -1)}
WITH_PREDICTOR = [f"{name} predictor" for name, needed in PREDICTOR.items() if needed]
# Each architecture, with a predictor where it can have one beside its scores.
FULL = [*DENSE, *(name for name, needed in PREDICTOR.items() if not needed), *WITH_PREDICTOR]


@pytest.mark.parametrize("case", CASES)
def test_an_offloaded_model_gives_the_same(case):
    model, ids = calibrated_case(case), tokens(2, 24)
    expected = logits(model, ids)
    generated = model.generate(ids[:, :6], max_new_tokens=4, do_sample=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(value.device.type == "meta" for value in model.parameters())
    torch.testing.assert_close(logits(model, ids), expected, atol=0, rtol=0)
    assert torch.equal(model.generate(ids[:, :6], max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("architecture", ALL)
def test_a_model_whose_layers_do_not_fit_is_loaded_in_parts(architecture, tmp_path):
    model, ids = calibrated(architecture), tokens(2, 24)
    model.save_pretrained(tmp_path)
    layer = sum(value.nbytes for value in model.model.layers[0].parameters())
    memory = {"cpu": model.get_memory_footprint() - layer // 4}  # the rest goes to the disk
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    layers = [place for place in loaded.hf_device_map if place.startswith("model.layers")]
    assert layers and all(place.count(".") == 2 for place in layers)  # each in one place, with its residuals
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids[:, :6], **options), model.generate(ids[:, :6], **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FULL)
def test_a_model_is_loaded_in_half_precision(case, dtype, tmp_path):
    model, ids = calibrated_case(case), tokens(2, 24)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert logits(half, ids).dtype == half.lm_head.weight.dtype == dtype
    kept = torch.float32 if dtype == torch.float16 else dtype
    routers = [p for name, p in half.named_parameters() if ".routers." in name]
    assert bool(routers) == (CASES[case][0] in ROUTED) and {p.dtype for p in routers} <= {kept, torch.float32}
    half.generate(ids[:, :6], max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("case", [*ROUTED, *WITH_PREDICTOR])
def test_what_decides_is_not_quantised(case):
    """Selection of given hidden states stays what it was, though all linear layers have 8 bits."""
    model, ids = calibrated_case(case), tokens(2, 24)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert type(quantised.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    seen = {}
    for layer, router in quantised.model.routers.items():
        for name, part in router.named_modules():
            if isinstance(part, (ScoreHead, SurpriseGate, Predictor)):
                part.register_forward_hook(
                    lambda _, inputs, output, at=(layer, name): seen.update({at: (inputs, output)})
                )
    logits(quantised, ids)
    parts = 3 if case in WITH_PREDICTOR else 1  # a predictor holds a score head
    assert len(seen) == parts * len(quantised.model.routers)
    for (layer, name), (inputs, output) in seen.items():
        exact = model.model.routers[layer].get_submodule(name)(*inputs)
        for got, expected in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (output, exact)), strict=True
        ):
            assert torch.equal(got, expected)


def sharded_gradients(rank, architecture, address, folder):
    """Gradients of one rank's rows under FSDP2, gathered."""
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        model, ids = tiny_model(architecture), tokens(4, 24)
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rows = ids[2 * rank : 2 * rank + 2]
        loss = model(input_ids=rows, labels=rows, num_items_in_batch=4 * 23, use_cache=False).loss
        (loss * 2).backward()  # FSDP averages over ranks
        found = {
            name: value.grad.full_tensor()
            for name, value in model.named_parameters()
            if value.grad is not None
        }
        if architecture in ROUTED:
            model.advance()
            found |= {name: value.clone() for name, value in model.routing_state.named_buffers()}
            RoutingCallback([BATCH]).on_train_end(None, None, None, model=model)
            found["calibrated"] = model.routing_state.thresholds
        torch.save(found, f"{folder}/{rank}.pt")
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            model.save_pretrained(f"{folder}/saved", state_dict=state)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("architecture", ALL)
def test_fsdp_of_two_processes_equals_one(architecture, tmp_path):
    address = f"file://{tmp_path}/meeting"
    torch.multiprocessing.spawn(sharded_gradients, (architecture, address, str(tmp_path)), nprocs=2)
    model, ids = tiny_model(architecture), tokens(4, 24)
    for rows in ids.split(2):  # as the ranks have them
        model(input_ids=rows, labels=rows, num_items_in_batch=4 * 23, use_cache=False).loss.backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    if architecture in ROUTED:
        model.advance()
        expected |= {name: value.clone() for name, value in model.routing_state.named_buffers()}
        RoutingCallback([BATCH]).on_train_end(None, None, None, model=model)
        expected["calibrated"] = model.routing_state.thresholds
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)
    saved, record = tmp_path / "saved", ARCHITECTURES[architecture]
    if record.module:
        values = json.loads((saved / "config.json").read_text())
        assert values["architectures"] == [f"{record.classes}ForCausalLM"]
        assert values["auto_map"]["AutoModelForCausalLM"] == f"{record.module}.{record.classes}ForCausalLM"
        assert (saved / f"{record.module}.py").is_file() and not [*saved.glob("*fsdp*")]
        loaded = AutoModelForCausalLM.from_pretrained(saved).eval()
        torch.testing.assert_close(logits(loaded, ids), logits(model.eval(), ids), atol=1e-4, rtol=1e-3)


def forward_on_one_rank(rank, architecture, address):
    """A training forward on rank 0 alone, then the end of a step on both."""
    limit = datetime.timedelta(seconds=20)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=limit)
    try:
        model = tiny_model(architecture)
        if rank == 0:
            model(input_ids=tokens(2, 24), use_cache=False)
        model.advance()
        both = [torch.zeros_like(model.routing_state.thresholds) for _ in range(2)]
        distributed.all_gather(both, model.routing_state.thresholds)
        assert torch.equal(*both) and both[0].any()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("architecture", ROUTED)
def test_a_forward_waits_for_no_other_rank(architecture, tmp_path):
    address = f"file://{tmp_path}/meeting"
    torch.multiprocessing.spawn(forward_on_one_rank, (architecture, address), nprocs=2)


@pytest.mark.parametrize("architecture", ROUTED)
def test_continuous_batching_is_refused(architecture):
    """Transformers would catch the error of its paged cache, and return no tokens."""
    model = calibrated(architecture)
    with pytest.raises(ValueError, match="continuous batching is not available"):
        model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ALL)
def test_embeddings_are_resized(architecture, tied, tmp_path):
    """More tokens, and fewer: those that stay are what they were, trained and saved with the new number."""
    model, ids = calibrated(architecture, tie_word_embeddings=tied), tokens(2, 12)
    before = logits(model, ids)
    model.resize_token_embeddings(VOCAB + 7)
    assert logits(model, ids).shape[-1] == model.config.vocab_size == model.vocab_size == VOCAB + 7
    torch.testing.assert_close(logits(model, ids)[..., :VOCAB], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    new = torch.full((2, 12), VOCAB + 3)
    model.train()(input_ids=new, labels=new, use_cache=False).loss.backward()
    assert (
        model.model.embed_tokens.weight.grad[VOCAB + 3].any() and len(model.lm_head.weight.grad) == VOCAB + 7
    )
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, new), logits(model, new))
    assert loaded.generate(new, max_new_tokens=2, do_sample=False).shape == (2, 14)
    model.resize_token_embeddings(VOCAB)
    torch.testing.assert_close(logits(model, ids), before)


# Words other than the defaults of the settings that our configurations add to Qwen2's.
WORDS = {
    "selection_rule": "topk",
    "training_rule": "threshold",
    "beta_schedule": "cosine",
    "surprise_normalize": "state",
    "gate": "raw",
    "targets": "threshold",
    "train_output": "dense",
}


def other_than(name, default):
    """A value that a setting may have beside its default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default - 1 if default else 11
    return default / 2 or 0.25 if isinstance(default, float) else WORDS[name]


@pytest.mark.parametrize("architecture", ALL)
def test_a_configuration_survives_every_way_it_is_carried(architecture, tmp_path):
    config_class = ARCHITECTURES[architecture].config_class
    added = {
        name
        for kind in config_class.__mro__
        if issubclass(kind, Qwen2Config) and kind is not Qwen2Config
        for name in inspect.get_annotations(kind)
    }
    added.discard("keys_to_ignore_at_inference")
    assert added or architecture == "standard"
    default = config_class()
    given = {name: other_than(name, getattr(default, name)) for name in added}
    config = config_class(**BACKBONE, **given)
    assert all(getattr(default, name) != value for name, value in given.items())
    config.save_pretrained(tmp_path)
    values = config.to_dict()
    for carried in (
        config_class.from_dict(values),
        config_class.from_dict(json.loads(config.to_json_string())),
        config_class(**values),
        AutoConfig.from_pretrained(tmp_path),
        copy.deepcopy(config),
    ):
        assert type(carried) is config_class
        assert {name: getattr(carried, name) for name in given} == given
        assert carried.to_dict() | {"_name_or_path": ""} == values
        assert getattr(carried, "routed_layers", []) == ([1, 3] if architecture in ROUTED else [])
