# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# kfp replaces a component's function by a task factory, which type checkers cannot see.
"""The pipeline: one data set, every architecture and seed, one comparison.

The same definition runs locally (`pipelines.run`) and on a cluster (`build/pipeline.yaml`).
"""

from typing import List  # noqa: UP035  (kfp reads the annotation)

from kfp import dsl

from components.compare import compare
from components.evaluate import evaluate
from components.export import export
from components.prepare_data import prepare_data
from components.start_comparison import start_comparison
from components.train import train


@dsl.pipeline(
    name="dynamic-transformers-comparison",
    description="Standard, Mixture-of-Depths, SDT and STT, trained on equal work and compared.",
)
def comparison_pipeline(
    settings: str,
    runs: List[str] = ["standard:0", "mod:0", "sdt:0", "stt:0"],  # noqa: B006, UP006
):
    """prepare_data → (train → export → evaluate) for each run → compare.

    Args:
        settings: all settings, as the JSON that `Settings.to_json` gives.
        runs: `architecture:seed`, one for each model to train.
    """
    started = start_comparison(settings=settings)
    # The id of a run that is new each time, so never from a cache.
    started.set_caching_options(False)
    prepared = prepare_data(settings=settings)
    with dsl.ParallelFor(runs, parallelism=1) as run:
        trained = train(
            settings=settings,
            run=run,
            parent_run=started.outputs["parent_run"],
            data=prepared.outputs["data"],
        )
        exported = export(data=prepared.outputs["data"], run_folder=trained.outputs["run_folder"])
        evaluated = evaluate(
            settings=settings,
            data=prepared.outputs["data"],
            run_folder=trained.outputs["run_folder"],
            model=exported.outputs["model"],
        )
    compare(
        settings=settings,
        parent_run=started.outputs["parent_run"],
        models=dsl.Collected(exported.outputs["model"]),
        evaluations=dsl.Collected(evaluated.outputs["evaluation"]),
    )
