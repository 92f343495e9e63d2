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
from components.prepare_data import prepare_data
from components.report_finished import report_finished
from components.train import train
from dynamic_transformers.configure import compose_settings
from pipelines.cluster import ClusterSettings, launch_of, place

NAME = "dynamic-transformers-comparison"


def comparison_pipeline(cluster: ClusterSettings, data_uri: str = ""):
    """The pipeline for a cluster, or for this machine: `pipelines.cluster.LOCAL`.

    Args:
        data_uri: where prepared data lie, which come in instead of being prepared. Chosen here and not by the
            pipeline: KFP 2.16 fails at a `dsl.OneOf` of artifacts (kubeflow/pipelines #13436).
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
