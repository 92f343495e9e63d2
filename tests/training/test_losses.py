"""Losses in chunks: equal to those of all logits at once, in a fraction of their memory."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes

from dynamic_transformers.training import losses
from dynamic_transformers.training.losses import token_losses
from tests.models.tiny import VOCAB, tiny_model, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [VOCAB - 1, 7 * VOCAB, 10_000 * VOCAB])
@torch.no_grad()
def test_chunks_give_the_loss_of_all_logits(monkeypatch, dtype, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    model = tiny_model("standard").eval().to(dtype)
    ids = tokens(3, 40)
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    found, likeliest = token_losses(model, hidden, ids[:, 1:].flatten())
    expected = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(likeliest, logits.argmax(-1) == ids[:, 1:].flatten())


@torch.no_grad()
def test_logits_are_never_whole():
    model = tiny_model("standard", vocab_size=2**15).eval()
    hidden, targets = torch.randn(4096, 32), tokens(1, 4096)[0]
    whole = 4 * len(targets) * 2**15
    with LiveBytes() as live:
        token_losses(model, hidden, targets)
    assert live.peak < whole / 2
    with LiveBytes() as live:
        F.cross_entropy(model.lm_head(hidden), targets)
    assert live.peak >= whole  # the counter sees them
