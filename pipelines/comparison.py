# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# kfp replaces a component's function by a task factory, which type checkers cannot see.
"""The pipeline: one data set, every variant at every point of the grid, one comparison.

The same definition runs locally (`pipelines.run`) and on a cluster (`build/pipeline.yaml`).
"""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components.compare import compare
from components.configure import configure
from components.evaluate import evaluate
from components.export import export
from components.merge_data import merge_data
from components.plan_data import plan_data
from components.prepare_data import prepare_data
from components.report_finished import report_finished
from components.tokenize_shards import tokenize_shards
from components.train import train
from dynamic_transformers.configure import compose_settings
from pipelines.cluster import LOCAL, ClusterSettings, launch_of, place

NAME = "dynamic-transformers-comparison"


def comparison_pipeline(cluster: ClusterSettings, data_uri: str = "", data_shards: int = 1):
    """The pipeline for a cluster, or for this machine: `pipelines.cluster.LOCAL`.

    Args:
        data_uri: where prepared data lie, which come in instead of being prepared. Chosen here and not by the
            pipeline: KFP 2.16 fails at a `dsl.OneOf` of artifacts (kubeflow/pipelines #13436).
        data_shards: in how many steps at a time the data are tokenized; 1: one step prepares them.
    """
    # The embedded data and a small model: what starts when nobody changes a parameter.
    quickstart = compose_settings("quickstart").to_json()

    @dsl.pipeline(
        name=NAME,
        description="Variants of standard, Mixture-of-Depths, SDT and STT models, on equal work, compared.",
    )
    def pipeline(
        settings: str = quickstart,
        variants: str = "",
        grid: str = "",
        overrides: List[str] = [],  # noqa: B006, UP006
        dataset_configs: str = "",
        max_flops: float = 0.0,
        mlflow_uri: str = "",
        mlflow_experiment: str = "",
    ):
        """configure → prepare_data → (train → export → evaluate) for each run → compare.

        With several data shards, plan_data → tokenize_shards for each group → merge_data do what prepare_data
        does.
        However what follows configure ends, report_finished has the last word.

        Args:
            settings: all settings, as the JSON that `Settings.to_json` gives; the others go over it.
            variants: JSON object, label → list of overrides; empty leaves `study.variants` of `settings`.
            grid: JSON object, setting → list of values, such as {"run.seed": [0, 1, 2]}; empty leaves that of
                `settings`.
            overrides: `key=value` each.
            dataset_configs: JSON list of data sources; empty leaves those of `settings`.
            max_flops: budget of each run in training FLOPs; 0 leaves that of `settings`.
            mlflow_uri: tracking server; empty leaves that of `settings`, or of MLFLOW_TRACKING_URI.
            mlflow_experiment: empty leaves that of `settings`.
        """
        parameters = dict(
            settings=settings,
            variants=variants,
            grid=grid,
            overrides=overrides,
            dataset_configs=dataset_configs,
            max_flops=max_flops,
            mlflow_uri=mlflow_uri,
            mlflow_experiment=mlflow_experiment,
        )
        imported = {}
        if data_uri:
            imported["data"] = dsl.importer(artifact_uri=data_uri, artifact_class=dsl.Dataset).output
        # Before the exit handler: KFP's local runner finds no loop items that a task beside the loop gives.
        configured = configure(**parameters, **imported)
        # It reads the step's environment, which no cache key knows.
        configured.set_caching_options(False)
        place(configured, "configure", cluster)
        merged = configured.outputs["merged"]
        last = report_finished(**parameters)
        # What it reports is in MLflow, which no cache key knows.
        last.set_caching_options(False)
        place(last, "report_finished", cluster)
        with dsl.ExitHandler(last, name="comparison"):
            if imported:
                data = imported["data"]
            elif data_shards > 1:
                data = prepared_in_groups(merged, data_shards, cluster)
            else:
                prepared = prepare_data(settings=merged)
                place(prepared, "prepare_data", cluster)
                data = prepared.outputs["data"]
            with dsl.ParallelFor(configured.outputs["runs"], parallelism=cluster.parallel_runs) as run:
                trained = train(settings=merged, run=run, data=data, launch=launch_of(cluster).to_json())
                place(trained, "train", cluster)
                run_folder = trained.outputs["run_folder"]
                exported = export(data=data, run_folder=run_folder)
                place(exported, "export", cluster)
                model = exported.outputs["model"]
                evaluated = evaluate(settings=merged, data=data, run_folder=run_folder, model=model)
                place(evaluated, "evaluate", cluster)
            compared = compare(
                settings=merged,
                models=dsl.Collected(exported.outputs["model"]),
                evaluations=dsl.Collected(evaluated.outputs["evaluation"]),
            )
            # It hangs the runs under a new one in MLflow, and measures speed.
            compared.set_caching_options(False)
            place(compared, "compare", cluster)

    return pipeline


def prepared_in_groups(settings, groups: int, cluster: ClusterSettings):
    """The same data as prepare_data gives, tokenized by `groups` steps at a time, each with its resources."""
    planned = plan_data(settings=settings)
    place(planned, "prepare_data", cluster)
    plan = planned.outputs["plan"]
    # A step takes all cores: on one machine they come one after the other.
    at_once = 1 if cluster is LOCAL else None
    with dsl.ParallelFor(list(range(1, groups + 1)), name="groups", parallelism=at_once) as group:
        tokenized = tokenize_shards(settings=settings, plan=plan, group=group, groups=groups)
        place(tokenized, "prepare_data", cluster)
    merged = merge_data(settings=settings, plan=plan, shards=dsl.Collected(tokenized.outputs["shards"]))
    place(merged, "prepare_data", cluster)
    return merged.outputs["data"]
