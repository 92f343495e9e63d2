"""README.md of an exported model: what it is, how it came about, how it is used, and its limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedConfig

from dynamic_transformers.models.architectures import architecture_of

CARD = "README.md"


def write_card(
    folder: Path,
    config: PreTrainedConfig,
    facts: dict[str, Any],
    sources: list[dict[str, Any]],
    validation_loss: float | None,
) -> None:
    """Write the card of a model into its folder.

    Args:
        config: of the model.
        facts: the manifest of the export.
        sources: as the data folder's manifest accounts for them.
        validation_loss: nats per token at the end of training, if it is known.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template("model_card.md.j2").render(
        facts,
        title=facts["variant"] or facts["architecture"],
        architecture=architecture_of(config),
        config=config,
        sources=sources,
        validation_loss=validation_loss,
    )
    (folder / CARD).write_text(text, encoding="utf-8")
