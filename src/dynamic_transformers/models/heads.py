"""Small networks that score tokens. What they give decides, so it is computed in fp32.

A head is no `nn.Linear`: whatever quantises a model, or puts adapters into all of its linear layers, leaves
the scores alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration import RoutedConfig


class ScoreHead(nn.Module):
    """s = w·x, without a bias, in fp32 also under autocast."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, size))

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B, T) of features (B, T, D)."""
        return (features.float() * self.weight.float().squeeze(0)).sum(-1)


class PairScoreHead(ScoreHead):
    """w·[x_t ‖ x_{t−1}] in two parts, each of one token alone: the second waits for the next token."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """What each token of (B, T, D) adds to its own score and to that of the next, (B, T) each."""
        now, back = self.weight.float().squeeze(0).chunk(2)
        features = features.float()
        return (features * now).sum(-1), (features * back).sum(-1)


class Predictor(nn.Module):
    """Membership of the training top-k, predicted from the token alone (MoD, section 3.5, method 2).

    d → d/2 → 1, SiLU, no biases. The input is detached: no gradient reaches the language model.
    """

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.hidden_size // 2, bias=False)
        self.down_proj = ScoreHead(config.hidden_size // 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (B, T) in fp32 for hidden states (B, T, D)."""
        features = hidden_states.detach().to(self.up_proj.weight.dtype)
        return self.down_proj(F.silu(self.up_proj(features)))
