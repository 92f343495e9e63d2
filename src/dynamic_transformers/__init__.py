"""Dynamic Transformers: four decoder-only architectures, trained on equal work and compared."""

__version__ = "0.1.0"

from dynamic_transformers.caches import use_writable_caches

use_writable_caches()  # before anything of Hugging Face is imported
