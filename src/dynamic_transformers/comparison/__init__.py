"""Comparison of evaluated runs: tables, plots and one self-contained report."""
