"""Which tokens a routed model computes in which layer, for a text: an HTML page and a PNG."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dynamic_transformers.models import RoutedConfig
from dynamic_transformers.settings import UserError

PAGE, PICTURE = "routing.html", "routing.png"
LABELLED_TOKENS = 80  # more do not fit under the picture


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
        tokens=[str(tokenizer.decode([token])) for token in ids],
        layers={layer: result.selected[0].tolist() for layer, result in routing.items()},
        model=config.model_type.removeprefix("qwen2_").upper().replace("MOD", "MoD"),
        rule=config.selection_rule,
        capacity=config.capacity,
    )


def write_routing(routing: Routing, folder: Path) -> None:
    """Write `routing.html` and `routing.png` into `folder`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    depth = [sum(layer[i] for layer in routing.layers.values()) for i in range(len(routing.tokens))]
    page = environment.get_template("routing.html.j2").render(
        routing=routing,
        fractions={layer: sum(chosen) / len(chosen) for layer, chosen in routing.layers.items()},
        depth=depth,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    picture(routing).savefig(folder / PICTURE, dpi=150, facecolor="white")


def picture(routing: Routing) -> Figure:
    """Layers from bottom to top, tokens from left to right; a filled cell was computed."""
    count = len(routing.tokens)
    figure = Figure(figsize=(max(6.0, 0.16 * count), 1.2 + 0.3 * len(routing.layers)), layout="constrained")
    axes = figure.subplots()
    axes.pcolormesh(
        torch.tensor([*routing.layers.values()]).float().numpy(), cmap="Blues", vmax=1.3, edgecolors="white"
    )
    axes.set_yticks([row + 0.5 for row in range(len(routing.layers))], [f"layer {i}" for i in routing.layers])
    if count <= LABELLED_TOKENS:
        labels = [token.replace("\n", "⏎").replace("$", r"\$") for token in routing.tokens]
        axes.set_xticks([i + 0.5 for i in range(count)], labels, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("token")
    axes.tick_params(length=0)
    axes.set_title(f"{routing.model}: tokens computed by each routed layer", fontsize=10)
    return figure


def add_routing_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `dynamic-transformers routing`."""
    parser.add_argument("--model_path", type=Path, required=True, help="folder of the exported model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="what the model reads")
    source.add_argument("--file", type=Path, help="a text file that the model reads")
    parser.add_argument("--output_dir", type=Path, help="default: the model's folder")


def routing_command(args: argparse.Namespace) -> None:
    """`routing`: write the page and the picture, and say where they are."""
    from transformers import AutoTokenizer

    from dynamic_transformers.evaluation.efficiency import load_model

    if not (args.model_path / "config.json").is_file():
        raise UserError(f"{args.model_path}: no exported model (it has no config.json)")
    if args.file and not args.file.is_file():
        raise UserError(f"{args.file}: no such file")
    text = args.file.read_text(encoding="utf-8") if args.file else args.text
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    routing = trace_routing(load_model(args.model_path), tokenizer, tokenizer(text)["input_ids"])
    folder = args.output_dir or args.model_path
    folder.mkdir(parents=True, exist_ok=True)
    write_routing(routing, folder)
    print(f"page:    {folder / PAGE}\npicture: {folder / PICTURE}")
