"""Which tokens a routed model computes in which layer, for a text: an HTML page and a PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamic_transformers.models.configuration import RoutedConfig
from dynamic_transformers.settings import UserError
from dynamic_transformers.templates import template

PAGE, PICTURE = "routing.html", "routing.png"
LINE, MOST_LINES = 64, 4  # tokens in a line of the picture, and lines


@dataclass
class Routing:
    """What a model did with a text.

    Attributes:
        tokens: text of each token.
        layers: routed layer → whether it computed each token.
        model, rule: names for the caption.
        capacity: target fraction.
    """

    tokens: list[str]
    layers: dict[int, list[bool]]
    model: str
    rule: str
    capacity: float


@torch.no_grad()
def trace_routing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Routing:
    """Run a routed model, in eval mode, over one sequence of token ids.

    Raises:
        UserError: the model routes nothing, or there is no token.
    """
    config = model.config
    if not isinstance(config, RoutedConfig):
        raise UserError(f"a {config.model_type} model routes nothing: it computes every token")
    if not ids:
        raise UserError("the text has no token")
    routing = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).routing
    return Routing(
        tokens=token_texts(tokenizer, ids),
        layers={layer: result.selected[0].tolist() for layer, result in routing.items()},
        model=config.model_type.removeprefix("qwen2_").upper().replace("MOD", "MoD"),
        rule=config.selection_rule,
        capacity=config.capacity,
    )


def write_routing(routing: Routing, folder: Path) -> None:
    """Write `routing.html` and `routing.png` into `folder`."""
    depth = [sum(layer[i] for layer in routing.layers.values()) for i in range(len(routing.tokens))]
    page = template("routing.html.j2", Path(__file__).parent).render(
        routing=routing,
        fractions={layer: sum(chosen) / len(chosen) for layer, chosen in routing.layers.items()},
        depth=depth,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    picture(routing).savefig(folder / PICTURE, dpi=150, facecolor="white")


def picture(routing: Routing) -> Figure:
    """Layers from bottom to top, the first tokens in lines from left to right; filled: computed."""
    shown = min(len(routing.tokens), LINE * MOST_LINES)
    starts = range(0, shown, LINE)
    figure = Figure(
        figsize=(10, len(starts) * (0.75 + 0.22 * len(routing.layers)) + 0.4), layout="constrained"
    )
    cells = torch.tensor([*routing.layers.values()]).float().numpy()
    for axes, start in zip(figure.subplots(len(starts), squeeze=False).flat, starts, strict=True):
        end = min(start + LINE, shown)
        axes.pcolormesh(
            cells[:, start:end], cmap="Blues", vmin=0, vmax=1.3, edgecolors="#dddddd", linewidth=0.4
        )
        axes.set_xlim(0, LINE)
        axes.set_yticks(
            [row + 0.5 for row in range(len(cells))], [f"layer {layer}" for layer in routing.layers]
        )
        labels = [token.replace("\n", "⏎").replace("$", r"\$") for token in routing.tokens[start:end]]
        axes.set_xticks([place + 0.5 for place in range(end - start)], labels, rotation=90)
        axes.tick_params(length=0, labelsize=7)
    note = "" if shown == len(routing.tokens) else f" (the first {shown} of {len(routing.tokens)})"
    figure.suptitle(f"{routing.model}: tokens computed by each routed layer{note}", fontsize=10)
    return figure


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Text of each token; a character that is spread over several tokens stands at the last of them."""
    texts, pending = [], []
    for token in ids:
        pending.append(token)
        text = str(tokenizer.decode(pending))
        whole = not text.endswith("\ufffd")
        texts.append(text if whole else "")
        pending = [] if whole else pending
    return texts
