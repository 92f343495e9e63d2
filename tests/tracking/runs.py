"""A run for a process of its own, without training."""

import sys

from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking import RunTracker


def track_run(run_dir, together):
    """Track a run when all others are there."""
    run_dir.mkdir()
    together.wait()
    tracker = RunTracker(run_dir, TrackingSettings(), run_dir.parent, run_dir.name, {"a": 1})
    tracker.log_data(run_dir, {"digest": "d", "splits": {}})
    for step in range(1, 21):
        tracker.log(step, {"tokens": step, "train/loss": 1.0})
    sys.exit(not tracker.close("FINISHED"))
