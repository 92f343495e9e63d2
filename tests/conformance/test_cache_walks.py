"""Random walks over all that can be done with a cache; each step gives what the uncached forward gives."""

import random

import pytest
import torch

from tests.models.tiny import CASES, ROUTED, calibrated_case, tokens

WALKS = 6
KINDS = ("plain", "padded", "packed")
# Of packed documents transformers' own cache does not know where one begins.
READ = [
    (case, kind)
    for case, (architecture, _) in CASES.items()
    for kind in KINDS
    if kind != "packed" or architecture in ROUTED
]


def rows_of(kind: str, batch: int, length: int, draw: random.Random) -> dict[str, torch.Tensor]:
    """What `forward` is told of the rows: nothing, left padding, or packed documents."""
    if kind == "padded":
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in mask:
            row[: draw.randrange(length)] = 0
        return {"attention_mask": mask}
    if kind == "packed":
        positions = torch.zeros(batch, length, dtype=torch.long)
        for row in positions:
            for place in range(1, length):
                row[place] = 0 if draw.random() < 0.2 else row[place - 1] + 1
        return {"position_ids": positions}
    return {}


@torch.no_grad()
def walk(model, kind: str, seed: int) -> None:
    """Read rows in pieces; between pieces reorder, select or repeat rows."""
    draw = random.Random(seed)
    batch, length = draw.choice([1, 2, 3, 5]), draw.randint(4, 20)
    ids, told = tokens(batch, length, seed=seed), rows_of(kind, batch, length, draw)
    expected = model(input_ids=ids, use_cache=False, **told).logits
    rows, cache, start = torch.arange(batch), None, 0
    while start < length:
        end = min(length, start + draw.choice([1, 1, 1, 2, 3, 7]))
        piece = {
            name: value[rows, :end] if name == "attention_mask" else value[rows, start:end]
            for name, value in told.items()
        }
        output = model(input_ids=ids[rows, start:end], past_key_values=cache, use_cache=True, **piece)
        real = torch.ones(len(rows), end - start, dtype=torch.bool)
        if kind == "padded":
            real = told["attention_mask"][rows, start:end].bool()
        got, wanted = output.logits[real], expected[rows, start:end][real]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
        cache, start = output.past_key_values, end
        step = draw.choice(["go on", "go on", "reorder", "select", "repeat"])
        if step == "reorder":
            chosen = torch.tensor(draw.choices(range(len(rows)), k=len(rows)))
            cache.reorder_cache(chosen)
            rows = rows[chosen]
        elif step == "select":
            chosen = torch.tensor(draw.sample(range(len(rows)), k=draw.randint(1, len(rows))))
            cache.batch_select_indices(chosen)
            rows = rows[chosen]
        elif step == "repeat" and len(rows) < 6:
            cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2)


@pytest.mark.parametrize(("case", "kind"), READ)
def test_a_walk_over_the_cache_agrees_with_the_uncached_forward(case, kind):
    model = calibrated_case(case, attention="eager" if "window" in case else "sdpa")
    for seed in range(WALKS):
        walk(model, kind, seed)
