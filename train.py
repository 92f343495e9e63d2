"""Prepare data if need be, train one model, export it.

python train.py [--config-name NAME] [--force] [key=value ...]
"""

import argparse

from dynamic_transformers.cli import add_config_arguments, train_command
from dynamic_transformers.command_line import run_command

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prepare data if need be, train one model, export it.")
    add_config_arguments(parser)
    run_command(train_command, parser)
