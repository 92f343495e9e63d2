"""Cross-entropy of tokens without their logits all at once.

N tokens have N × vocabulary logits: of 16 rows of 1024 tokens of Qwen2's vocabulary that is 10 GB in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, hidden_states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each target, and whether it is the likeliest token.

    The head computes in the precision of the model; the softmax is in fp32.

    Args:
        hidden_states: the backbone's last ones, where the targets are predicted, (N, D).
        targets: token ids, (N,).

    Returns:
        Nats in fp32, (N,), and bool, (N,).
    """
    head = model.get_output_embeddings()
    assert head is not None
    tokens = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    losses = torch.empty(len(targets), device=hidden_states.device)
    likeliest = torch.empty_like(targets, dtype=torch.bool)
    for start in range(0, len(targets), tokens):
        part = slice(start, start + tokens)
        logits = head(hidden_states[part]).float()
        losses[part] = F.cross_entropy(logits, targets[part], reduction="none")
        likeliest[part] = logits.argmax(-1) == targets[part]
    return losses, likeliest
