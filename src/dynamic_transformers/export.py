"""Checkpoint → Hugging Face folder, reloaded in a process that does not import this package, and compared.

The standard model is written as stock `qwen2`. Routed ones carry the flat files of `models/` and load with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.folders import set_aside
from dynamic_transformers.manifest import (
    input_folder,
    read_manifest,
    step_output,
    write_manifest,
)
from dynamic_transformers.model_card import write_card
from dynamic_transformers.models import tokenization
from dynamic_transformers.models.architectures import ARCHITECTURES
from dynamic_transformers.models.plugin import add_plugin
from dynamic_transformers.settings import UserError
from dynamic_transformers.tracking import METRICS
from dynamic_transformers.training.heldout import fixed_randomness
from dynamic_transformers.training.run_folder import CONFIG

logger = logging.getLogger("dynamic_transformers")

TOLERANCE = 1e-4  # of logits, fp32, same machine

RELOAD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, output, vocab_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.arange(64).remainder(vocab_size).view(2, 32)
torch.manual_seed(0)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids, use_cache=False).logits.contiguous()}, output)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
Path(output).with_suffix(".json").write_text(json.dumps(
    [tokenizer.backend_tokenizer.to_str(), tokenizer.split_special_tokens, tokenizer.special_tokens_map]))
assert "dynamic_transformers" not in sys.modules
"""


def export(run_dir: Path, output_dir: Path, data_dir: Path | None = None, force: bool = False) -> Path:
    """Write the final model of a training run as a Hugging Face folder.

    Args:
        run_dir: folder that `train` wrote.
        output_dir: the Hugging Face folder.
        data_dir: the run's data; default: where the run's manifest says it was.
        force: export again although `output_dir` is finished. A folder to which something was added since,
            such as results, is renamed.

    Raises:
        UserError: `run_dir` is not a finished run, its weights were removed, or its data are elsewhere.
        RuntimeError: the reloaded model's logits or its tokenizer differ.
    """
    config = {"run_digest": read_manifest(run_dir, "train")["digest"]}
    with step_output(output_dir, "export", config, force) as output:
        if output is not None:
            difference = fill(output, run_dir, data_dir or input_folder(run_dir, "data"), config)
            logger.info("export: %s (reloaded logits differ by %.1e at most)", output_dir, difference)
            keep_what_was_added(output_dir.resolve(), output)
    return output_dir


def fill(output: Path, run_dir: Path, data_dir: Path, config: dict[str, Any]) -> float:
    """Write the model into an empty folder; returns by how much its logits differ when it is loaded there.

    Raises:
        UserError, RuntimeError: as `export`.
    """
    run = read_manifest(run_dir, "train")
    plugin = plugin_of(run_dir)
    data = read_manifest(data_dir, "prepare_data")
    block_size = data["block_size"]
    model, tokenizer = load_run(run_dir), load_tokenizer(data_dir)
    model.config.max_position_embeddings = trained_context(model.config, run["config"], block_size)
    model.save_pretrained(output)
    for name, text in plugin.items():
        (output / name).write_text(text, encoding="utf-8")
    save_tokenizer(tokenizer, output, stock=model.config.model_type == "qwen2")
    difference = reload_difference(model, tokenizer, output)
    if not difference <= TOLERANCE:  # NaN must not pass
        raise RuntimeError(f"{run_dir}: logits of the reloaded model differ by {difference:.2e}")
    facts = {
        key: run[key]
        for key in (
            "variant", "point", "overrides", "seed", "architecture", "parameters", "training_tokens",
            "training_flops", "training_seconds", "train_routed_fraction", "mlflow_run_id",
        )
    }  # fmt: skip
    manifest = write_manifest(
        output,
        "export",
        config,
        {"run": run_dir, "data": data_dir},
        **facts,
        run_config=run["config"],
        block_size=block_size,
        data_dir=str(data_dir.resolve()),
        logits_difference=difference,
    )
    write_card(output, model.config, manifest, data["sources"], last_validation_loss(run_dir))
    return difference


def last_validation_loss(run_dir: Path) -> float | None:
    """The last held-out loss of a run's metrics; None where it has none."""
    lines = (json.loads(line) for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines())
    losses = [line["eval/loss"] for line in lines if "eval/loss" in line]
    return losses[-1] if losses else None


def keep_what_was_added(old: Path, new: Path) -> None:
    """Rename a model's folder that holds more than a model, such as results: they are of its weights."""
    names = {path.name for path in old.iterdir()} if old.is_dir() else set()
    if added := sorted(names - {path.name for path in new.iterdir()}):
        logger.info("export: the model before, with %s, is now in %s", ", ".join(added), set_aside(old))


def trained_context(config: PreTrainedConfig, run_config: dict[str, Any], block_size: int) -> int:
    """Tokens of context that a model has seen: its blocks, or more if it was pretrained.

    No result depends on it; programs that load the model, as lm-eval, take it for the longest text.
    """
    if run_config["training.mode"] == "scratch":
        return block_size
    return max(config.max_position_embeddings, block_size)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, stock: bool) -> None:
    """Write the tokenizer such that AutoTokenizer loads exactly this one.

    Args:
        stock: whether config.json says qwen2. AutoTokenizer then ignores the class that tokenizer_config.json
            names and takes its own, with another normalization, unless there is an `auto_map`. Without
            `trust_remote_code` it passes over what that names, and reads tokenizer.json.
    """
    if stock:
        tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": [None, "tokenization.ExactTokenizer"]}
        shutil.copyfile(tokenization.__file__, folder / "tokenization.py")
    tokenizer.save_pretrained(folder)


def plugin_of(run_dir: Path) -> dict[str, str]:
    """The files of the plugin that a run was trained with; its architecture is known from now on."""
    settings = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
    plugin = settings["model"].get("plugin") or {}
    if plugin:
        add_plugin(plugin)
    return plugin


def load_run(run_dir: Path) -> PreTrainedModel:
    """The final model of a finished run, in eval mode, on the CPU, fp32.

    Raises:
        UserError: the run is unfinished, or its weights were removed or damaged.
    """
    run = read_manifest(run_dir)
    architecture = ARCHITECTURES[run["architecture"]]
    model = architecture.model_class(architecture.config_class.from_dict(run["model_config"]))
    weights = run_dir / run["checkpoint"] / "model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{weights}: removed since the run finished; put it back, or train again with --force"
        )
    try:
        load_model(model, weights)
        # From a file, since one that contradicts itself can be saved again only if it is as it was read.
        model.generation_config = GenerationConfig.from_pretrained(weights.parent)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{weights}: damaged ({reason}); train again with --force") from error
    return model.eval()


@torch.no_grad()
def reload_difference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> float:
    """Largest difference of logits between `model` and `folder` as another process loads it.

    Raises:
        RuntimeError: it does not load, or with another tokenizer.
    """
    ids = torch.arange(64).remainder(model.config.vocab_size).view(2, 32)
    with fixed_randomness(model.device):  # for the control, whose routing is random
        expected = model(input_ids=ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "reloaded.safetensors"
        command = [sys.executable, "-c", RELOAD, str(folder), str(output), str(model.config.vocab_size)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{folder} does not load on its own:\n{result.stderr}")
        reloaded = load_file(output)["logits"]
        read = json.loads(output.with_suffix(".json").read_text())
    if read != [tokenizer.backend_tokenizer.to_str(), True, tokenizer.special_tokens_map]:
        raise RuntimeError(f"{folder}: AutoTokenizer loads another tokenizer than that of training")
    return (reloaded - expected).abs().max().item()
