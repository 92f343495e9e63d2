"""What a step of a pipeline leaves in its log, and how it ends."""

import pytest

from components.configure import configure
from dynamic_transformers.step_log import step_log


def test_a_fault_leaves_its_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), step_log(tmp_path / "step"):
        print(1 / 0)
    assert "Traceback" in (tmp_path / "step.log").read_text()


def test_a_users_mistake_is_one_line_of_a_step_that_fails(tmp_path):
    parameters = {"overrides": ["model.tpye=mod"], "dataset_configs": "", "max_flops": 0.0}
    with pytest.raises(SystemExit) as end:
        configure.python_func(
            settings="{}",
            variants="",
            grid="",
            mlflow_uri="",
            mlflow_experiment="",
            merged=str(tmp_path / "merged"),
            runs=str(tmp_path / "runs"),
            **parameters,
        )
    assert end.value.code == 2
    (line,) = (tmp_path / "merged.log").read_text().splitlines()
    assert "tpye" in line
    assert not (tmp_path / "merged").exists()
