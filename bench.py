"""Benchmark an exported model with lm-eval; prints a table and writes `results.json` beside the model.

python bench.py --model_path DIR --tasks general,math --batch_size 8
"""

import argparse

from dynamic_transformers.command_line import run_command
from dynamic_transformers.evaluation.bench import add_bench_arguments, bench_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmark an exported model with lm-eval.")
    add_bench_arguments(parser)
    run_command(bench_command, parser)
