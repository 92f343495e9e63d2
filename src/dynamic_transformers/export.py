"""Checkpoint → Hugging Face folder, reloaded in a process that does not import this package, and compared.

The standard model is written as stock `qwen2`. Routed ones carry the flat files of `models/` and load with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model
from transformers import PreTrainedModel

from dynamic_transformers.data.loading import load_tokenizer
from dynamic_transformers.manifest import finished, fresh_folder, read_manifest, write_manifest
from dynamic_transformers.models import MODEL_CLASSES

logger = logging.getLogger("dynamic_transformers")

TOLERANCE = 1e-4  # of logits, fp32, same machine

RELOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
folder, output, vocab_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = torch.arange(64).remainder(vocab_size).view(2, 32)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids, use_cache=False).logits.contiguous()}, output)
assert "dynamic_transformers" not in sys.modules
"""


def export(run_dir: Path, output_dir: Path, data_dir: Path | None = None, force: bool = False) -> Path:
    """Write the final model of a training run as a Hugging Face folder.

    Args:
        run_dir: folder that `train` wrote.
        output_dir: the Hugging Face folder.
        data_dir: the run's data; default: where the run's manifest says it was.
        force: export again although `output_dir` is finished.

    Raises:
        UserError: `run_dir` is not a finished run.
        RuntimeError: the reloaded model's logits differ.
    """
    run = read_manifest(run_dir, "train")
    config = {"run_digest": run["digest"]}
    if not force and finished(output_dir, "export", config):
        logger.info("export: %s is finished, nothing to do", output_dir)
        return output_dir
    data_dir = data_dir or Path(run["inputs"]["data"]["path"])
    model = load_run(run_dir)
    with fresh_folder(output_dir, "export") as temporary:
        model.save_pretrained(temporary)
        load_tokenizer(data_dir).save_pretrained(temporary)
        difference = reload_difference(model, temporary)
        if not difference <= TOLERANCE:  # NaN must not pass
            raise RuntimeError(f"{output_dir}: logits of the reloaded model differ by {difference:.2e}")
        facts = {
            key: run[key]
            for key in (
                "seed", "architecture", "parameters", "training_tokens", "training_flops", "training_seconds",
                "train_routed_fraction", "mlflow_run_id",
            )
        }  # fmt: skip
        write_manifest(
            temporary,
            "export",
            config,
            {"run": run_dir, "data": data_dir},
            **facts,
            run_config=run["config"],
            block_size=read_manifest(data_dir, "prepare_data")["block_size"],
            data_dir=str(data_dir.resolve()),
            logits_difference=difference,
        )
    logger.info("export: %s (reloaded logits differ by %.1e at most)", output_dir, difference)
    return output_dir


def load_run(run_dir: Path) -> PreTrainedModel:
    """The final model of a finished run, in eval mode, on the CPU, fp32."""
    run = read_manifest(run_dir)
    config_class, model_class = MODEL_CLASSES[run["architecture"]]
    model = model_class(config_class.from_dict(run["model_config"]))
    load_model(model, run_dir / run["checkpoint"] / "model.safetensors")
    return model.eval()


@torch.no_grad()
def reload_difference(model: PreTrainedModel, folder: Path) -> float:
    """Largest difference of logits between `model` and `folder` as another process loads it."""
    ids = torch.arange(64).remainder(model.config.vocab_size).view(2, 32)
    expected = model(input_ids=ids, use_cache=False).logits
    output = folder / "reloaded.safetensors"
    command = [sys.executable, "-c", RELOAD, str(folder), str(output), str(model.config.vocab_size)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{folder} does not load on its own:\n{result.stderr}")
    reloaded = load_file(output)["logits"]
    output.unlink()
    return (reloaded - expected).abs().max().item()
