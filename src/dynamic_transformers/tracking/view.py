"""The page of MLflow that shows a comparison in charts: a view of the experiment's runs, saved with it.

MLflow keeps such a view as a tag of the experiment, lists it in the menu "Views" of the runs page, and opens
it from a link with the tag's key. The format is that of MLflow's own pages, and documented nowhere: a test
opens the page in a browser.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from dynamic_transformers.tracking.delivery import EVAL_FLOPS
from dynamic_transformers.tracking.store import store_name

LOCAL_SERVER = "http://127.0.0.1:5000"  # of `make mlflow-ui`
VIEW_TAG = "view"  # of the run that holds a report: the link to its charts, behind the server's address
STATE_TAG = "mlflow.sharedViewState."  # of the experiment, before the view's key
# Of each loss the metric that holds the training FLOPs at its steps.
LOSSES = {"eval/loss": EVAL_FLOPS, "train/loss": "progress/training_flops"}
# Ordered by date, the page folds runs away that hang under another, as a task's own run may.
ORDER = "metrics.`test/loss`"
MANY = 8  # runs, whose bars need a higher card


def view_link(experiment: str, key: str) -> str:
    """The link to a view of an experiment, behind the address of the server."""
    return f"#/experiments/{experiment}/runs?compareRunsMode=CHART&viewStateShareKey={key}"


def full_link(server: str, link: str) -> str:
    """The same behind the address of a server, which may hold a password."""
    parts = urlsplit(server)
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return f"{store_name(address)}/{link}"


def saved_view(name: str, query: str, bars: Mapping[str, Sequence[str]], runs: int) -> str:
    """The tag's value: the loss as lines over both axes, then sections of bars.

    Args:
        name: in the menu "Views".
        query: which runs are shown.
        bars: metrics by the section that they stand in.
        runs: their number.
    """
    sections = {
        "Loss against training FLOPs": [_line(metric, flops) for metric, flops in LOSSES.items()],
        "Loss against tokens (step)": [_line(metric) for metric in LOSSES],
    }
    wide = len(sections)
    sections |= {title: [_bar(metric) for metric in metrics] for title, metrics in bars.items()}
    charts = []
    for section, cards in sections.items():
        for card in cards:
            charts.append(
                card
                | {"uuid": f"chart-{len(charts)}", "metricSectionId": section, "runsCountToCompare": runs}
            )
    state = {
        "searchFilter": query,
        "orderByKey": ORDER,
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": charts,
        "compareRunSections": [
            {
                "uuid": section,
                "name": section,
                "display": True,
                "isReordered": True,
                "columns": 2 if place < wide else 3,
                "cardHeight": 360 if runs <= MANY else 500,
            }
            for place, section in enumerate(sections)
        ],
        "isAccordionReordered": True,  # else the page sorts sections by name
    }
    # Packed: a tag of an older server takes 5000 characters.
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": int(time.time() * 1000), "state": f"deflate;{packed}"})


def _line(metric: str, axis: str = "") -> dict[str, Any]:
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "metric" if axis else "step",
        "selectedXAxisMetricKey": axis,
        "useGlobalXaxisKey": False,
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "deleted": False,
        "isGenerated": False,
    }


def _bar(metric: str) -> dict[str, Any]:
    return {
        "type": "BAR",
        "metricKey": metric,
        "deleted": False,
        "isGenerated": False,
    }
