"""Standard, Mixture-of-Depths, SDT and STT language models on a Qwen2 backbone."""

import os

# Idle OpenMP threads spin and take the cores from whatever else runs; torch reads this when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# evaluate has a switch of its own, without which it would wait minutes for a hub that is not there.
if offline := os.environ.get("HF_HUB_OFFLINE"):
    os.environ.setdefault("HF_EVALUATE_OFFLINE", offline)

__version__ = "0.1.0"

from dynamic_transformers.caches import use_writable_caches

use_writable_caches()  # before anything of Hugging Face is imported
