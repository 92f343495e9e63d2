"""Plain lines of a log."""

from __future__ import annotations

import logging
import sys

import datasets
import transformers

logger = logging.getLogger("dynamic_transformers")


def configure_logging() -> None:
    """Plain lines with a time on standard output, no bars in logs; called once by each command."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
