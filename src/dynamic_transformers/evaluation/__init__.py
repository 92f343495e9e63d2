"""Evaluation of exported models: held-out loss, lm-eval suites, efficiency."""
