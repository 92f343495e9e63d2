"""The architectures, one record a file. A further one: its file, and its name here.

A record says all that the rest of the program asks of an architecture: its settings, classes, FLOPs, kinds of
parameters, name and description. The modules themselves are the files of models/, which an export carries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dynamic_transformers.models.architectures.base import Architecture

FILES = (
    "standard",
    "mod",
    "sdt",
    "stt",
    "looped",
)
ARCHITECTURES: dict[str, Architecture] = {
    file: importlib.import_module(f"{__name__}.{file}").ARCHITECTURE for file in FILES
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The record of a model's configuration.

    Raises:
        KeyError: none of ours.
    """
    by_type = {record.model_type: record for record in ARCHITECTURES.values()}
    return by_type[config.model_type]
