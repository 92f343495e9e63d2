"""Two gloo processes train what one process trains."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dynamic_transformers.manifest import read_manifest
from dynamic_transformers.settings import PROJECT_ROOT
from dynamic_transformers.training.trainer import train
from tests.models.tiny import ALL, ROUTED

WORKER = """
import sys
from pathlib import Path
import torch
from dynamic_transformers.configure import settings_from_json
from dynamic_transformers.training import trainer
run_dir = Path(sys.argv[3])
model = []
facts_of = trainer.facts_of
trainer.facts_of = lambda state, *rest: (model.append(state.plain), facts_of(state, *rest))[1]
trainer.train(settings_from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), run_dir)
rank = torch.distributed.get_rank()
assert torch.distributed.get_world_size() == 2
state = {name: value for name, value in model[-1].named_buffers() if ".routing_state." in name}
torch.distributed.barrier()
for name, value in state.items():
    both = [torch.empty_like(value) for _ in range(2)]
    torch.distributed.all_gather(both, value)
    assert torch.equal(*both), name
assert len(state) == int(sys.argv[4])
print(f"rank {rank}: thresholds and β agree")
"""


def run_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("architecture", "model"),
    [*((name, {}) for name in ALL), ("stt", {"selection_rule": "even"})],
    ids=[*ALL, "stt even"],
)
def test_two_processes_equal_one(architecture, model, make_settings, data_dir, tmp_path):
    one = train(make_settings(architecture, model=model, data={"batch_size": 4}), data_dir, tmp_path / "one")
    settings = make_settings(architecture, model=model, data={"batch_size": 2})
    (tmp_path / "settings.json").write_text(settings.to_json())
    (tmp_path / "worker.py").write_text(WORKER)
    two = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [tmp_path / name for name in ("worker.py", "settings.json")]
    result = subprocess.run(
        [*launch, *map(str, [*arguments, data_dir, two, 3 if architecture in ROUTED else 0])],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rank 0" in result.stdout and "rank 1" in result.stdout
    for alone, together in zip(run_metrics(one), run_metrics(two), strict=True):
        assert alone["step"] == together["step"] and alone["tokens"] == together["tokens"]
        for key in alone:
            if key in ("train/loss", "train/grad_norm") or (
                key.startswith("train/") and key.endswith("_loss")
            ):
                assert together[key] == pytest.approx(alone[key], rel=2e-3), key
    first, second = (
        load_file(folder / read_manifest(folder)["checkpoint"] / "model.safetensors") for folder in (one, two)
    )
    for name, value in first.items():
        if "threshold" not in name:  # the mean of two quantiles is not the quantile of both
            torch.testing.assert_close(second[name], value, atol=2e-3, rtol=1e-2)
