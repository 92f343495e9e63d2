"""Models under the other auto classes: a backbone alone, and a classifier of whole texts."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from dynamic_transformers.training.huggingface import RoutingCallback
from tests.models.tiny import ALL, BACKBONE, ROUTED, calibrated, tiny_model, tokens

PAD = 96
LENGTHS = (20, 13, 7, 20, 5, 20, 11, 2)

# What a process without this package makes of an exported folder.
ALONE = """
import json, sys
sys.modules["dynamic_transformers"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification
folder, output = sys.argv[1:]
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
classifier = AutoModelForSequenceClassification.from_pretrained(
    folder, trust_remote_code=True, num_labels=3, pad_token_id=95
)
found = {name: value.clone() for name, value in backbone.state_dict().items()}
for name, value in classifier.model.state_dict().items():
    assert torch.equal(found[name], value), name
ids = torch.arange(36).remainder(90).view(3, 12)
with torch.no_grad():
    found["hidden"] = backbone.eval()(ids, use_cache=False).last_hidden_state
classifier.train()(ids, torch.ones_like(ids), labels=torch.tensor([0, 2, 1])).loss.backward()
without = [n for n, p in classifier.named_parameters() if p.grad is None or not p.grad.any()]
print(json.dumps([type(backbone).__name__, type(classifier).__name__, without]))
save_file(found, output)
classifier.save_pretrained(folder + "-again")
AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
"""


@pytest.mark.parametrize("architecture", ALL)
def test_an_exported_folder_gives_backbone_and_classifier_without_this_package(architecture, tmp_path):
    model = calibrated(architecture)
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "found.safetensors"
    command = [sys.executable, "-c", ALONE, str(tmp_path / "model"), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    name = type(model).__name__.removesuffix("ForCausalLM")
    *classes, without = json.loads(result.stdout)
    assert classes == [f"{name}Model", f"{name}ForSequenceClassification"]
    assert not without  # every part of it learns, routers and score head too
    found = load_file(output)
    ids = torch.arange(36).remainder(90).view(3, 12)
    with torch.no_grad():
        assert torch.equal(found.pop("hidden"), model.model(ids, use_cache=False).last_hidden_state)
    for name, value in model.model.state_dict().items():
        assert torch.equal(found.pop(name), value), name
    assert not found


@pytest.fixture
def classifier(request, tmp_path):
    """Made from a language model, as anybody makes one."""
    model = calibrated(request.param)
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    made = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=3, pad_token_id=PAD
    )
    torch.nn.init.normal_(made.score.weight)
    return made


def rows(labels=(0, 1, 2, 0, 1, 2, 0, 1), pad="right"):
    """Texts of several lengths, padded to 20 tokens."""
    result = []
    for seed, (length, label) in enumerate(zip(LENGTHS, labels, strict=True)):
        ids, mask = tokens(1, 20, seed=seed, vocabulary=PAD)[0], torch.arange(20) < length
        if pad == "left":
            ids, mask = ids.roll(-length), mask.flip(0)
        result.append(
            {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long(), "labels": label}
        )
    return result


def padded_logits(classifier, pad, names=("input_ids", "attention_mask")):
    """Of all texts in one batch."""
    texts = rows(pad=pad)
    return classifier(**{name: torch.stack([text[name] for text in texts]) for name in names}).logits


@pytest.mark.parametrize("classifier", ALL, indirect=True)
@torch.no_grad()
def test_padding_on_either_side_and_no_padding_give_equal_logits(classifier):
    alone = [
        classifier(text["input_ids"][None, :length]).logits
        for text, length in zip(rows(), LENGTHS, strict=True)
    ]
    expected = torch.cat(alone)
    for given in (("right",), ("left",), ("right", ["input_ids"])):
        found = padded_logits(classifier, *given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classifier", ROUTED, indirect=True)
@torch.no_grad()
def test_a_mask_says_what_is_padding_where_no_token_does(classifier):
    expected = padded_logits(classifier, "left")
    classifier.config.pad_token_id = None
    torch.testing.assert_close(padded_logits(classifier, "left"), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="which tokens pad is not known"):
        padded_logits(classifier, "right", ["input_ids"])


@torch.no_grad()
def test_at_full_capacity_with_unit_gate_it_is_qwen2s(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = Qwen2ForSequenceClassification.config_class(**BACKBONE, num_labels=3, pad_token_id=PAD)
    theirs = Qwen2ForSequenceClassification(config).eval()
    model = calibrated("mod", capacity=1.0, num_labels=3, pad_token_id=PAD)
    ours = AutoModelForSequenceClassification.from_config(model.config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    monkeypatch.setattr(torch, "sigmoid", torch.ones_like)
    for pad in ("left", "right"):
        texts = rows(pad=pad)
        inputs = {name: torch.stack([torch.as_tensor(text[name]) for text in texts]) for name in texts[0]}
        found, expected = ours(**inputs), theirs(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classifier", ROUTED, indirect=True)
def test_auxiliary_losses_train_with_it(classifier):
    texts = rows()
    inputs = {name: torch.stack([torch.as_tensor(text[name]) for text in texts]) for name in texts[0]}
    classifier.config.aux_weight = 0.5  # of MoD, which has none by default
    output = classifier.train()(**inputs)
    weights = {"aux": 0.5, "prior": 0.05, "student": 0.01}
    assert output.auxiliary_losses
    total = sum(weights[name] * value for name, value in output.auxiliary_losses.items())
    torch.testing.assert_close(output.loss, output.classification_loss + total)
    assert total > 0
    assert classifier.eval()(**inputs).auxiliary_losses == {}


LABELS = {
    "one": (0, 1, 2, 0, 1, 2, 0, 1),
    "one, some unknown": (0, -100, 2, 0, -100, 2, 0, 1),
    "number": (0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 1.0, 3.0),
    "number, some unknown": (0.5, -1.0, -100.0, 0.0, 1.5, -100.0, 1.0, 3.0),
    "several": [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]] * 4,
    "several, some unknown": [[1.0, -100.0, 1.0], [-100.0] * 3, [0.0, 0.0, 1.0], [0.0, -100.0, -100.0]] * 2,
}


@pytest.mark.parametrize("kind", ["one", "number", "several"])
def test_unknown_labels_count_in_no_loss(kind):
    """The loss is the mean over the known elements, and 0 where none is known."""
    labels = torch.tensor(LABELS[f"{kind}, some unknown"])
    known = labels != -100
    language_model = tiny_model("mod", num_labels=1 if kind == "number" else 3, pad_token_id=PAD)
    model = AutoModelForSequenceClassification.from_config(language_model.config).eval()
    output = model(tokens(8, 12), labels=labels)
    logits = output.logits if kind == "one" else output.logits.view(labels.shape)
    function = {"one": F.cross_entropy, "number": F.mse_loss, "several": F.binary_cross_entropy_with_logits}
    torch.testing.assert_close(output.loss, function[kind](logits[known], labels[known]))
    unknown = model.train()(tokens(8, 12), labels=torch.full_like(labels, -100))
    assert unknown.loss == 0
    unknown.loss.backward()
    assert all(value.grad is None or not value.grad.any() for value in model.parameters())


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("classifier", ROUTED, indirect=True)
def test_gradients_in_trainer_do_not_depend_on_how_a_step_is_cut(classifier, labels, tmp_path):
    data = rows(labels)
    if isinstance(labels[0], float):
        classifier.config.num_labels, classifier.num_labels = 1, 1
        classifier.score = torch.nn.Linear(32, 1, bias=False)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}

    def gradients(batch, accumulation):
        found = {}

        class Watched(Trainer):
            def training_step(self, model, *rest, **more):
                loss = super().training_step(model, *rest, **more)
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                return loss

        classifier.load_state_dict(start)
        classifier.zero_grad()
        arguments = TrainingArguments(
            str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
            logging_strategy="no", max_steps=1, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        Watched(classifier, arguments, train_dataset=data, callbacks=[RoutingCallback()]).train()
        return found

    one, eight = gradients(8, 1), gradients(1, 8)
    assert one.keys() == eight.keys() and "score.weight" in one
    for name, value in one.items():
        torch.testing.assert_close(eight[name], value, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("classifier", ALL, indirect=True)
def test_it_learns_in_trainer_and_evaluates(classifier, tmp_path, request):
    """Which of two tokens a text ends with."""
    data = [
        row | {"labels": int(row["input_ids"][length - 1] > 48)}
        for row, length in zip(rows(), LENGTHS, strict=True)
    ]
    arguments = TrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", max_steps=30, per_device_train_batch_size=8, learning_rate=3e-3,
    )  # fmt: skip

    def accuracy(prediction):
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        classifier, arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy,
        callbacks=[RoutingCallback()],
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_right"] == 1
    if request.node.callspec.params["classifier"] in ROUTED:
        assert classifier.routing_state.thresholds.any()
    classifier.save_pretrained(tmp_path / "trained")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained").eval()
    ids = tokens(1, 9)
    assert torch.equal(again(ids).logits, classifier.eval()(ids).logits)
    assert type(AutoModel.from_pretrained(tmp_path / "trained")).__name__.endswith("Model")


@pytest.mark.parametrize("classifier", ALL, indirect=True)
@torch.no_grad()
def test_an_adapter_keeps_thresholds_and_score_head(classifier, tmp_path, request):
    adapted = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=4))
    if request.node.callspec.params["classifier"] in ROUTED:
        adapted.routing_state.thresholds += 0.1
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.normal_(std=0.1)
    ids = tokens(1, 12)
    expected = adapted.eval()(input_ids=ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
