"""Compiles the pipeline: `python -m pipelines.compile [build/pipeline.yaml]`."""

import sys
from pathlib import Path

from kfp import compiler

from pipelines.comparison import comparison_pipeline

DEFAULT_PACKAGE = Path("build/pipeline.yaml")


def compile_pipeline(path: Path = DEFAULT_PACKAGE) -> Path:
    """Write the pipeline's YAML to `path` and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(comparison_pipeline, str(path))  # type: ignore[arg-type]
    return path


if __name__ == "__main__":
    print(compile_pipeline(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PACKAGE))
