"""Windows of tokens and the loss on them, used by analysis and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Negative log likelihood (nats) of each token given those before it: float32 [batch, L - 1].

    logits [batch, L, vocab] of any float dtype, input_ids int64 [batch, L]. The logits of the
    last position predict nothing here and are left out.
    """
    predicted = logits[:, :-1].flatten(0, 1).to(torch.float32)
    losses = torch.nn.functional.cross_entropy(
        predicted, input_ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(input_ids.shape[0], -1)


def mean_loss(losses: Tensor) -> float:
    """Mean over all predicted tokens, summed in float64."""
    return float(losses.to(torch.float64).mean())


@torch.no_grad()
def window_losses(
    forward: Callable[[Tensor], Tensor], windows: Tensor, batch_size: int = 1
) -> Iterator[Tensor]:
    """token_nll of each batch of windows, on the CPU; ``forward`` maps input_ids to logits."""
    for ids in windows.split(batch_size):
        yield token_nll(forward(ids), ids).cpu()


def standard_error(differences: Sequence[float], tokens: Sequence[int]) -> float | None:
    """Of sum(differences) / sum(tokens), over windows as clusters; None for fewer than two.

    ``differences``: of a window's summed losses in two runs; ``tokens``: that they are sums over.
    The formula stands at evaluation's ``paired_difference``.
    """
    total, count = sum(tokens), len(differences)
    if count < 2:
        return None
    delta = math.fsum(differences) / total
    residuals = math.fsum((d - delta * n) ** 2 for d, n in zip(differences, tokens, strict=True))
    return math.sqrt(count / (count - 1) * residuals) / total
