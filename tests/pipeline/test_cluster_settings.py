"""Mistakes in a cluster's file."""

import pytest
from omegaconf import OmegaConf

from dynamic_transformers.settings import UserError
from pipelines.cluster import read_cluster


def tolerating(**toleration):
    return {"steps": {"train": {"tolerations": [{"key": "good"}, {"key": "bad", **toleration}]}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": {"training": {}}}, "steps.training: must be one of"),
        ({"step": {}}, "step"),
        ({"steps": {"train": {"gpus": 1}}}, "gpus"),
        ({"nodes": 2, "volume_claim": ""}, "nodes=2 needs volume_claim"),
        ({"grace_seconds": 20}, "grace_seconds=20: must be at least 30"),
        ({"parallel_runs": 0}, "parallel_runs=0: must be at least 1"),
        ({"retries": "often"}, "retries"),
        ({"retries": -1}, "retries=-1: must be at least 0"),
        ({"retries": 11}, "retries=11: must be at most 10"),
        ({"steps": {"train": {"accelerators": -1}}}, "steps.train.accelerators=-1: must be at least 0"),
        ({"steps": {"train": {"timeout_seconds": -1}}}, "steps.train.timeout_seconds=-1: must be at least 0"),
        (
            {"steps": {"export": {"cpu": "lots"}}},
            "steps.export.cpu=lots: must be a quantity, such as 8 or 500m",
        ),
        ({"steps": {"export": {"memory": "64 GB"}}}, "steps.export.memory=64 GB: must be a quantity"),
        ({"shared_memory": "much"}, "shared_memory=much: must be a quantity, such as 64Gi"),
        ({"mount_path": "rel"}, "mount_path=rel: must be an absolute path"),
        (
            tolerating(operator="Foo"),
            r"steps.train.tolerations\[1\].operator=Foo: must be one of Exists, Equal",
        ),
        (tolerating(operator="Exists", value="a"), "value=a: needs operator=Equal"),
        (tolerating(effect="Never"), r"steps.train.tolerations\[1\].effect=Never: must be one of NoSchedule"),
    ],
)
def test_a_mistake_in_the_cluster_file_is_named(change, message, tmp_path):
    path = tmp_path / "cluster.yaml"
    OmegaConf.save(OmegaConf.create(change), path)
    with pytest.raises(UserError, match=rf"^{path}: .*{message}"):
        read_cluster(path)


def test_a_missing_or_broken_cluster_file_ends_in_one_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("steps: [}")
    (tmp_path / "number.yaml").write_text("3")
    (tmp_path / "list.yaml").write_text("- steps")
    for name in ("gone.yaml", "broken.yaml", "number.yaml", "list.yaml"):
        with pytest.raises(UserError, match=rf"{name}: .*$"):
            read_cluster(tmp_path / name)
