"""MLflow (and Weights & Biases) behind one small face, which an outage cannot stop or slow.

`metrics.jsonl` in the run folder is the truth. `tracking.json` beside it says how far a run has been sent and
what else is to be sent. A thread sends it during training. Any later step that opens the same run folder goes
on where it stopped, and so does `dynamic-transformers sync`. Only rank 0 tracks.

- `tracker`: the face
- `inputs`: data as MLflow shows them
- `record`: what a run has to tell, and how much of it has been sent
- `store`: MLflow's client, and what its errors mean
- `delivery`, `sender`: what brings the record to the store, and the thread that does it
- `search`: what was tracked, found again
- `compared`, `view`: a finished comparison, and the page that shows it
- `registry`: the compared models
- `ui`: MLflow's pages on this machine, opened at that one
- `sync`: the command
- `wandb_run`: Weights & Biases
"""

from dynamic_transformers.tracking.compared import track_comparison
from dynamic_transformers.tracking.record import METRICS, STATE, forget_after, replace_run
from dynamic_transformers.tracking.registry import ComparedRun
from dynamic_transformers.tracking.search import (
    COMPARISON_TAG,
    REPORT_TAG,
    download,
    find_evaluated,
    report_of,
    view_of,
)
from dynamic_transformers.tracking.store import tracking_uri
from dynamic_transformers.tracking.sync import reopened, send_rest
from dynamic_transformers.tracking.tracker import RunTracker, description

__all__ = [
    "COMPARISON_TAG",
    "METRICS",
    "REPORT_TAG",
    "STATE",
    "ComparedRun",
    "RunTracker",
    "description",
    "download",
    "find_evaluated",
    "forget_after",
    "reopened",
    "replace_run",
    "report_of",
    "send_rest",
    "track_comparison",
    "tracking_uri",
    "view_of",
]
