"""Data as MLflow shows them: what they are called, by what they are told apart, what they hold."""

import json
from copy import deepcopy
from pathlib import Path

import mlflow
from runs import DATA

from dynamic_transformers.tracking import RunTracker, tracking_uri
from dynamic_transformers.tracking.inputs import inputs_of


def with_second_source(data):
    """With a data set of the hub as well."""
    data = deepcopy(data)
    data["sources"].append(data["sources"][0] | {"name": "edu", "tokens": 12_345_678_901})
    hub = {"name": "edu", "path": "org/edu", "config": "10BT", "revision": "main", "data_files": None}
    data["config"]["dataset_configs"].append(data["config"]["dataset_configs"][0] | hub)
    data["config"]["fingerprints"]["edu"] = {"commit": "c" * 40}
    return data


def digests(data):
    return [entry["digest"] for entry in inputs_of(Path("data"), data)]


def test_a_run_has_the_mixture_and_each_source_as_inputs(store, run_dir):
    tracker = RunTracker(run_dir, *store, "a")
    tracker.log_data(run_dir / "data", with_second_source(DATA))
    assert tracker.close("FINISHED")
    client = mlflow.MlflowClient(tracking_uri(*store))
    inputs = client.get_run(tracker.run_id).inputs.dataset_inputs
    mixture, web, edu = inputs
    assert [entry.dataset.name for entry in inputs] == ["web + edu", "web", "edu"]
    assert mixture.dataset.digest == DATA["content_digest"][:36]
    profile = json.loads(mixture.dataset.profile)
    assert profile["splits"] == {"train": {"tokens": 9}} and len(profile["sources"]) == 2
    assert mlflow.data.get_source(web).to_dict() == {"uri": "texts/*.jsonl"}
    assert json.loads(web.dataset.profile)["made_of"] == {"texts/1.jsonl": "1" * 64}
    hub = mlflow.data.get_source(edu)
    assert (hub.path, hub.config_name, hub.revision) == ("org/edu", "10BT", "c" * 40)
    tags = [{tag.key: tag.value for tag in entry.tags} for entry in inputs]
    assert [tag["mlflow.data.context"] for tag in tags] == ["training", "source", "source"]
    assert (tags[2]["tokens"], tags[2]["epochs"]) == ("12345678901", "0.5")


def test_a_source_is_told_apart_by_what_is_read_of_which_files():
    before = digests(DATA)
    assert len({*before}) == len(before)
    changed = deepcopy(DATA)
    changed["config"]["fingerprints"]["web"]["texts/1.jsonl"] = "2" * 64
    assert digests(changed)[0] == before[0] and digests(changed)[1] != before[1]
    changed = deepcopy(DATA)
    changed["config"]["dataset_configs"][0]["text_column"] = "body"
    assert digests(changed)[1] != before[1]
    changed["config"]["dataset_configs"][0] |= {"text_column": "text", "weight": 0.1}
    assert digests(changed) == before


def test_of_very_many_files_the_number_is_told():
    many = deepcopy(DATA)
    many["config"]["fingerprints"]["web"] = {f"texts/{number}.jsonl": "1" * 64 for number in range(5000)}
    entry = list(inputs_of(Path("data"), many))[1]
    assert json.loads(entry["profile"])["made_of"] == {"files": 5000}
    assert len(entry["digest"]) == 36


def test_embedded_and_unknown_sources_have_a_place():
    data = deepcopy(DATA)
    source = data["config"]["dataset_configs"][0]
    source |= {"path": "embedded", "data_files": None}
    data["config"]["fingerprints"]["web"] = {"Python": "3.11.2"}
    assert json.loads(list(inputs_of(Path("data"), data))[1]["source"]) == {"uri": "embedded"}
    source |= {"path": "org/edu"}  # the hub was far when it was asked for the commit
    data["config"]["fingerprints"]["web"] = None
    assert json.loads(list(inputs_of(Path("data"), data))[1]["source"]) == {"uri": "org/edu"}
