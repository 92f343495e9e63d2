"""A run for a process of its own, without training, and the manifest of its data."""

import sys

from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking import RunTracker

DATA = {
    "content_digest": "d" * 64,
    "splits": {"train": {"tokens": 9, "files": {"tokens.bin": "0" * 64}}},
    "sources": [
        {
            **{"name": "web", "documents_used": 3, "tokens": 9, "epochs": 0.5},
            **{"proportion_asked": 1.0, "proportion_realised": 1.0},
        }
    ],
    "config": {
        "dataset_configs": [
            {
                **{"name": "web", "path": "json", "config": None, "revision": None, "filter": []},
                **{"data_files": {"train": ["texts/*.jsonl"]}, "split": "train", "validation_split": None},
                **{"text_column": "text", "columns": {}, "sample_by": "line", "weight": 0.7},
            }
        ],
        "fingerprints": {"web": {"texts/1.jsonl": "1" * 64}},
    },
}


def track_run(run_dir, together):
    """Track a run when all others are there."""
    run_dir.mkdir()
    together.wait()
    tracker = RunTracker(run_dir, TrackingSettings(), run_dir.parent, run_dir.name, {"a": 1})
    tracker.log_data(run_dir, DATA)
    for step in range(1, 21):
        tracker.log(step, {"tokens": step, "train/loss": 1.0})
    sys.exit(not tracker.close("FINISHED"))
