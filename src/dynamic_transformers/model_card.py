"""README.md of an exported model: what it is, how it came about, how it is used, and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from dynamic_transformers.models.architectures import architecture_of
from dynamic_transformers.templates import template

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
    text = template("model_card.md.j2", Path(__file__).parent).render(
        facts,
        title=facts["variant"] or facts["architecture"],
        architecture=architecture_of(config),
        config=config,
        sources=sources,
        validation_loss=validation_loss,
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def with_results(card: str, figures: Mapping[str, float], conditions: str) -> str:
    """The card with a table of figures under its heading Results.

    Args:
        figures: name → value.
        conditions: what they hold for: data, selection rule, precision.
    """
    before, heading, rest = card.partition("## Results\n")
    after = rest[rest.index("\n## ") :]
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in figures.items())
    return f"{before}{heading}\n{conditions}\n\n| figure | value |\n|---|---|\n{rows}{after}"
