"""One log file for each pipeline step, beside the step's output folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamic_transformers.command_line import machine_failure
from dynamic_transformers.settings import UserError
from dynamic_transformers.training.display import configure_logging

logger = logging.getLogger("dynamic_transformers")


@contextmanager
def step_log(output: Path) -> Iterator[None]:
    """Copy what a step logs to `<output>.log`, while it still reaches the console.

    A failing step leaves its traceback there; a `UserError` becomes one line and exit code 2, a full disk and
    its like one line and 1, which every runner of pipelines counts as failures.
    """
    configure_logging()
    logging.captureWarnings(True)
    output.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(output.with_name(f"{output.name}.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    receivers = (logging.getLogger(), logger)
    for receiver in receivers:
        receiver.addHandler(handler)
    start = time.perf_counter()
    try:
        yield
        logger.info("finished in %.1f s", time.perf_counter() - start)
    except UserError as error:
        logger.error("failed after %.1f s: %s", time.perf_counter() - start, error)
        raise SystemExit(2) from None
    except SystemExit as error:  # a signal, after which the step has ended in order
        logger.info("ended after %.1f s with exit code %s", time.perf_counter() - start, error.code)
        raise
    except BaseException as error:
        line = machine_failure(error) if isinstance(error, Exception) else None
        if line is not None:
            logger.error("failed after %.1f s: %s", time.perf_counter() - start, line)
            raise SystemExit(1) from None
        logger.exception("failed after %.1f s", time.perf_counter() - start)
        raise
    finally:
        for receiver in receivers:
            receiver.removeHandler(handler)
        handler.close()
