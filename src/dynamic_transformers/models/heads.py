"""Small networks that score tokens. What they give decides, so it is computed in fp32.

Nothing here is an `nn.Linear`: whatever quantises a model, or puts adapters into all of its linear layers,
leaves the scores alone.
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


class ScoreMap(nn.Module):
    """W·x, without a bias, in fp32 also under autocast: what a score is made of."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size))

    def forward(self, features: Tensor) -> Tensor:
        """(B, T, W) for features (B, T, D)."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight.float())


class Predictor(nn.Module):
    """Membership of the training top-k, predicted from the token alone (MoD, section 3.5, method 2).

    d → d/2 → 1, SiLU, no biases. The input is detached: no gradient reaches the language model.
    """

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.up_proj = ScoreMap(config.hidden_size, config.hidden_size // 2)
        self.down_proj = ScoreHead(config.hidden_size // 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits (B, T) in fp32 for hidden states (B, T, D)."""
        return self.down_proj(F.silu(self.up_proj(hidden_states.detach())))
