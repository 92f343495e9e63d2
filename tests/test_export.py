"""Exported folders load in a process that has torch and transformers alone, with equal logits."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dynamic_transformers.export import export, load_run
from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import ARCHITECTURES, UserError
from dynamic_transformers.training.trainer import train

# Everything that such an environment lacks is made unimportable.
ALONE = """
import sys
for name in "dynamic_transformers accelerate datasets mlflow lm_eval hydra omegaconf kfp".split():
    sys.modules[name] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.decode(tokenizer("12 + 7 = 19")["input_ids"]) == "12 + 7 = 19"
ids = torch.arange(48).remainder(model.config.vocab_size).view(2, 24)
prompt = ids[:, :6]
text = model.generate(prompt, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
assert text.shape == (2, 10)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits.contiguous()}, output)
"""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, make_settings, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = make_settings(request.param, training={"max_steps": 8, "log_every": 4})
    run_dir = train(settings, data_dir, folder / "run")
    return run_dir, export(run_dir, folder / "final_model")


def test_loads_alone_with_equal_logits(exported, tmp_path):
    run_dir, folder = exported
    trust = "no" if read_manifest(folder)["architecture"] == "standard" else "trust"
    output = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", ALONE, str(folder), str(output), trust]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
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
    assert config["model_type"] == ("qwen2" if architecture == "standard" else f"qwen2_{architecture}")
    assert ("auto_map" in config) == (architecture != "standard")
    assert manifest["inputs"]["run"]["digest"] == read_manifest(run_dir)["digest"]
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt"))


def test_a_finished_export_is_returned(exported):
    run_dir, folder = exported
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert export(run_dir, folder) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="unfinished"):
        export(tmp_path, tmp_path / "model")
