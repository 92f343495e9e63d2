"""Labels of runs of any configuration: by what differs."""

from synthetic_evaluations import make_run

from dynamic_transformers.comparison.labels import label_runs


def labelled(*runs):
    label_runs(runs)
    return [run["variant"] for run in runs]


def unlabelled(architecture, seed=0, **settings):
    run = make_run(architecture, seed) | {"variant": None}
    run["settings"] |= {key.replace("__", "."): value for key, value in settings.items()}
    return run


def test_runs_of_a_study_keep_their_labels():
    runs = [make_run("mod", seed, variant=name) for name in ("a", "b") for seed in range(2)]
    assert labelled(*runs) == ["a", "a", "b", "b"]


def test_a_run_without_a_label_is_called_by_its_architecture():
    assert labelled(unlabelled("standard"), unlabelled("mod"), unlabelled("mod", 1)) == [
        "standard",
        "mod",
        "mod",
    ]


def test_what_differs_joins_the_label():
    few = unlabelled("mod", model__capacity=0.125)
    runs = [few, unlabelled("mod", model__capacity=0.25), unlabelled("mod", 1, model__capacity=0.25)]
    assert labelled(*runs) == ["mod capacity=0.125", "mod capacity=0.25", "mod capacity=0.25"]
    assert labelled(
        unlabelled("mod", budget=None), unlabelled("mod", budget={"unit": "step", "limit": 7})
    ) == [
        "mod budget=default",
        "mod budget=step 7",
    ]


def test_too_many_differences_are_told_apart_by_a_digest():
    runs = [unlabelled("mod", a=number, b=number, c=number, d=number) for number in range(2)]
    first, second = labelled(*runs)
    assert first.startswith("mod a=0, b=0, c=0, … ") and second.startswith("mod a=1, b=1, c=1, … ")
    assert first != second


def test_points_of_a_grid_differ_by_what_the_grid_says():
    runs = [make_run("mod", point={"model.size": size}) for size in ("tiny", "small")]
    assert labelled(*runs) == ["mod", "mod"]


def test_other_data_with_the_same_seed_is_another_variant():
    runs = [make_run("mod"), make_run("mod"), make_run("mod", 1)]
    runs[1]["reference"]["data_digest"] = "b" * 64
    assert labelled(*runs[:2]) == ["mod data=cccccccc", "mod data=bbbbbbbb"]
    own = [make_run("mod", seed) for seed in range(2)]
    own[1]["reference"]["data_digest"] = "b" * 64  # each seed has its own data
    assert labelled(*own) == ["mod", "mod"]
