"""Windows of tokens and the loss on them, used by analysis and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ROWS = 32


def token_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Negative log likelihood (nats) of each token given those before it: float32 [batch, L - 1].

    logits [batch, L, vocab] of any float dtype, input_ids int64 [batch, L]. The logits of the
    last position predict nothing here and are left out.
    """
    predicted, wanted = logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    # On the CPU rows in small parts: log-softmax's temporary stays in the cache.
    rows = ROWS if logits.device.type == "cpu" else max(1, len(wanted))
    parts = zip(predicted.split(rows), wanted.split(rows), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(part.to(torch.float32), ids, reduction="none")
        for part, ids in parts
    ]
    return torch.cat(losses).view(input_ids.shape[0], -1)


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
