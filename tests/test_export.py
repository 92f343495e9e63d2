"""Exported folders load in a process that has torch and transformers alone, with equal logits and tokens."""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import unicodedata

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

from dynamic_transformers.data.loading import load_split, load_tokenizer
from dynamic_transformers.data.tokenization import encoder_of, load_pretrained_tokenizer
from dynamic_transformers.evaluation.exported import load_model
from dynamic_transformers.evaluation.harness import run_benchmarks
from dynamic_transformers.evaluation.results import add_results, identity, read_results
from dynamic_transformers.export import export, load_run, save_tokenizer
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.model_card import CARD
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.heldout import evaluate_heldout
from dynamic_transformers.training.trainer import train
from tests.models.tiny import ALL, tiny_model

# Everything that such an environment lacks is made unimportable.
ALONE = """
import json, sys
for name in "dynamic_transformers accelerate datasets mlflow lm_eval hydra omegaconf kfp peft".split():
    sys.modules[name] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output, trust, texts = sys.argv[1], sys.argv[2], sys.argv[3] == "trust", json.loads(sys.argv[4])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
# Our configuration is code: without an answer there, AutoTokenizer asks for one.
for options in ({"trust_remote_code": False} if trust else {}, {"trust_remote_code": True}):
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    print(json.dumps([tokenizer(text)["input_ids"] for text in texts]))
assert tokenizer.decode(tokenizer("12 + 7 = 19")["input_ids"]) == "12 + 7 = 19"
ids = torch.arange(48).remainder(model.config.vocab_size).view(2, 24)
prompt = ids[:, :6]
text = model.generate(prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
assert text.shape == (2, 10)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits.contiguous()}, output)
"""

VIETNAMESE = unicodedata.normalize("NFD", "Nguyễn học tiếng Việt; đường phố 1.234")
HARD_TEXTS = [
    VIETNAMESE,
    unicodedata.normalize("NFD", "한국어 텍스트"),  # jamo
    "a text that spells <|endoftext|> and <|im_end|><|endoftext|>",
    "<|endoftext|> at its begin",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "\u0301\u0323 marks alone x\u0323\u0307 x\u0307\u0323 ﬁ Å Å",
    "CR\rLF\nboth\r\n\ttab  \t two\u00a0spaces\u3000",
    "trailing   ",
    "   leading\n\n\n",
    "I'LL don't 12345 x_1 == 3.14e-7",
    "\x00\x7f\ufeff\ufffd\u200b",
    "w" * 3000 + "é" * 50,
    "",
]


def is_stock(architecture):
    """Whether transformers has the model itself, so that its export carries no code."""
    return ARCHITECTURES[architecture].config_class is Qwen2Config


def ids_of_training(data_dir):
    return [found.input_ids[1:-1].tolist() for found in encoder_of(load_tokenizer(data_dir))(HARD_TEXTS)]


@pytest.fixture(scope="module", params=ALL)
def exported(request, make_settings, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = make_settings(request.param, training={"max_steps": 8, "log_every": 4})
    run_dir = train(settings, data_dir, folder / "run")
    before = os.umask(0o027)
    try:
        return run_dir, export(run_dir, folder / "final_model")
    finally:
        os.umask(before)


def test_loads_alone_with_equal_logits_and_tokens(exported, data_dir, tmp_path):
    run_dir, folder = exported
    trust = "no" if is_stock(read_manifest(folder)["architecture"]) else "trust"
    output = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", ALONE, str(folder), str(output), trust, json.dumps(HARD_TEXTS)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    expected = ids_of_training(data_dir)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [expected, expected]
    model = load_run(run_dir)
    ids = torch.arange(48).remainder(model.config.vocab_size).view(2, 24)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.equal(load_file(output)["logits"], expected)


def test_model_type_and_lineage(exported):
    run_dir, folder = exported
    manifest = read_manifest(folder)
    config = json.loads((folder / "config.json").read_text())
    architecture = manifest["architecture"]
    assert config["model_type"] == ARCHITECTURES[architecture].model_type
    assert ("auto_map" in config) != is_stock(architecture)
    for auto, place in config.get("auto_map", {}).items():
        file, name = place.split(".")
        assert f"class {name}(" in (folder / f"{file}.py").read_text(), auto
    assert config["max_position_embeddings"] == 32  # the blocks of its training
    assert manifest["inputs"]["run"]["digest"] == read_manifest(run_dir)["digest"]
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_a_new_model_generates_with_the_tokenizers_special_tokens(exported, data_dir):
    tokenizer = load_tokenizer(data_dir)
    saved = json.loads((exported[1] / "generation_config.json").read_text())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert saved[name] == getattr(tokenizer, name) is not None


def test_a_finished_export_is_returned(exported):
    run_dir, folder = exported
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert export(run_dir, folder) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="unfinished"):
        export(tmp_path, tmp_path / "model")


def test_lm_eval_by_itself_reads_as_training_did(exported, data_dir):
    lm = HFLM(pretrained=str(exported[1]), device="cpu", batch_size=1)
    assert [lm.tok_encode(text) for text in HARD_TEXTS] == ids_of_training(data_dir)
    assert lm.prefix_token_id == load_split(data_dir, "train").input_ids(0)[0]
    assert lm.max_length == 32


@torch.no_grad()
def test_bench_scores_the_tokens_of_training(exported, data_dir, tmp_path):
    texts = [text for text in HARD_TEXTS if 0 < len(text) < 60]
    (tmp_path / "tasks").mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "tasks/perplexity_hard.jsonl").write_text(rows)
    found = run_benchmarks(exported[1], ["dt_perplexity_hard"], data_dir=tmp_path, batch_size=1)
    model, nats, size = load_model(exported[1]), 0.0, 0
    for document in encoder_of(load_tokenizer(data_dir))(texts):
        ids = torch.from_numpy(document.input_ids[:-1]).long()[None]  # the end of text is not scored
        scores = model(input_ids=ids.to(model.device)).logits.log_softmax(-1).cpu()
        nats -= scores[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        size += document.num_bytes.sum()
    expected = nats / math.log(2) / size
    assert found["results"]["dt_perplexity_hard"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)


def test_a_foreign_tokenizer_beside_a_qwen2_configuration(tmp_path):
    """One that cuts words otherwise, has a marker of its own and puts it in front."""
    letters = {"<s>": 0, "</s>": 1, **{c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet(), 2)}}
    backend = Tokenizer(models.BPE({**letters, "1Ġ": len(letters)}, [("1", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "foreign")
    tokenizer = load_pretrained_tokenizer(str(tmp_path / "foreign"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "qwen2"}')
    save_tokenizer(tokenizer, tmp_path / "model", stock=True)
    for text in (*HARD_TEXTS, "</s> 1 <s>"):
        (expected,) = encoder_of(tokenizer)([text])
        loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
        assert [0, *loaded(text)["input_ids"], 1] == expected.input_ids.tolist()
    loaded.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text) == loaded(text)


def test_files_have_the_mode_that_the_umask_says(exported):
    assert {path.stat().st_mode & 0o777 for path in exported[1].iterdir()} == {0o640}
    assert exported[1].stat().st_mode & 0o777 == 0o750


def test_the_random_control_exports_and_evaluates(make_settings, data_dir, tmp_path):
    settings = make_settings("mod", model={"selection_rule": "random"})
    folder = export(train(settings, data_dir, tmp_path / "run"), tmp_path / "model")
    assert read_manifest(folder)["logits_difference"] == 0
    assert math.isfinite(evaluate_heldout(load_model(folder), load_split(data_dir, "test"), 4).loss)
    found = run_benchmarks(folder, ["quick_test"], data_dir=data_dir, batch_size=4, limit=2)
    assert "dt_perplexity_math" in found["results"]


@pytest.mark.parametrize(("spoil", "message"), [("remove", "removed since"), ("cut", "damaged")])
def test_weights_that_are_gone_or_damaged_are_told(exported, tmp_path, spoil, message):
    shutil.copytree(exported[0], tmp_path / "run")
    weights = tmp_path / "run" / read_manifest(exported[0])["checkpoint"] / "model.safetensors"
    weights.unlink() if spoil == "remove" else os.truncate(weights, 10_000)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "model", force=True)
    assert not (tmp_path / "model").exists()


def test_results_of_replaced_weights_are_kept_with_them(make_settings, data_dir, tmp_path, caplog):
    folder = tmp_path / "model"

    def trained(steps):
        training = {"max_steps": steps, "optimizer": {"min_lr_fraction": 0.1}}
        return train(make_settings(training=training), data_dir, tmp_path / "run")

    export(trained(2), folder)
    export(trained(3), folder)
    assert not list(tmp_path.glob("model.replaced-*"))  # nothing was added to it
    found = {"results": {"a": {}}, "config": {}, "configs": {}, "realised": {}}
    add_results(folder / "results.json", found, identity(folder))
    weights = (folder / "model.safetensors").read_bytes()
    with caplog.at_level(logging.INFO, "dynamic_transformers"):
        export(trained(4), folder)
    (kept,) = tmp_path.glob("model.replaced-*")
    assert [line for line in caplog.messages if "results.json" in line and str(kept) in line]
    assert (kept / "model.safetensors").read_bytes() == weights
    assert read_results(kept / "results.json", identity(kept))["results"] == {"a": {}}
    assert (folder / "model.safetensors").read_bytes() != weights
    assert not (folder / "results.json").exists()


# A process in which transformers says that it is of another version.
OTHER_VERSION = """
import sys
sys.path.insert(0, sys.argv[2])
sys.modules["dynamic_transformers"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.parametrize(
    ("version", "fits"), [("4.57.1", False), ("5.12.1", False), ("5.99.0", True), ("6.0.0", False)]
)
def test_exported_code_says_which_transformers_it_needs(version, fits, tmp_path):
    tiny_model("mod").save_pretrained(tmp_path / "model")
    facts = tmp_path / f"site/transformers-{version}.dist-info/METADATA"
    facts.parent.mkdir(parents=True)
    facts.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    command = [sys.executable, "-c", OTHER_VERSION, str(tmp_path / "model"), str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == fits, result.stderr
    if not fits:
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("ImportError")]
        assert "transformers>=5.13,<6 is required" in line and f"found transformers=={version}" in line


def test_the_card_says_what_the_model_is_and_its_program_runs(exported):
    _, folder = exported
    card, manifest = (folder / CARD).read_text(), read_manifest(folder)
    record = ARCHITECTURES[manifest["architecture"]]
    for part in (record.description, manifest["digest"], f"{manifest['parameters']:,}"):
        assert part in card
    assert ("selection rule" in card) == record.routed
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    result = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("def "), result.stderr
