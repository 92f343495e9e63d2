"""The architectures, one record a file. A further one: its file, and a line here.

A record says all that the rest of the program asks of an architecture: its settings, classes, FLOPs, kinds of
parameters, name and description. The modules themselves are the files of models/, which an export carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamic_transformers.models.architectures.base import Architecture
from dynamic_transformers.models.architectures.mod import MoD
from dynamic_transformers.models.architectures.sdt import SDT
from dynamic_transformers.models.architectures.standard import Standard
from dynamic_transformers.models.architectures.stt import STT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURES: dict[str, Architecture] = {record.name: record for record in (Standard(), MoD(), SDT(), STT())}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The record of a model's configuration.

    Raises:
        KeyError: none of ours.
    """
    by_type = {record.model_type: record for record in ARCHITECTURES.values()}
    return by_type[config.model_type]
