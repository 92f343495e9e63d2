"""Dynamic Transformers: four decoder-only architectures, trained on equal work and compared."""

__version__ = "0.1.0"
