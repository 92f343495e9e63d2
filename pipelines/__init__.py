"""The pipeline: its definition, its compilation, and ways to run it."""
