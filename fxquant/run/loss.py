"""Windows of tokens and the loss on them, used by analysis and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fxquant.errors import ModelError

ROWS = 32


def token_nll(logits: Tensor, input_ids: Tensor, highest: int | None = None) -> Tensor:
    """Negative log likelihood (nats) of each token given those before it: float32 [batch, L - 1].

    logits [batch, L, vocab] of any float dtype, input_ids int64 [batch, L]. The logits of the
    last position predict nothing here and are left out. ``highest``: the largest id, of these or of
    all windows that they come from, where the caller knows it: to read it here waits for the
    device. Raises ModelError for what are no logits of these tokens, saying which.
    """
    check_logits(logits, input_ids, highest)
    predicted, wanted = logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
    # On the CPU rows in small parts: log-softmax's temporary stays in the cache.
    rows = ROWS if logits.device.type == "cpu" else max(1, len(wanted))
    parts = zip(predicted.split(rows), wanted.split(rows), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(part.to(torch.float32), ids, reduction="none")
        for part, ids in parts
    ]
    return torch.cat(losses).view(input_ids.shape[0], -1)


def highest_id(input_ids: Tensor) -> int:
    """The largest of ``input_ids``, -1 where there is none."""
    return int(input_ids.max()) if input_ids.numel() else -1


def check_logits(found: object, input_ids: Tensor, highest: int | None = None) -> None:
    """Raise ModelError where ``found``, a model's result, is anything but dense floating-point
    logits [batch, length, vocab] of ``input_ids`` int64 [batch, length], none over ``highest``."""
    if not isinstance(found, Tensor):
        raise _no_logits(f"a {type(found).__name__}", input_ids)
    if found.is_nested or found.layout != torch.strided or found.is_quantized or found.is_meta:
        raise _no_logits("a tensor that is not dense or holds no values", input_ids)
    if not found.is_floating_point():
        raise _no_logits(f"a tensor of {found.dtype}", input_ids)
    if found.dim() != 3 or found.shape[:2] != input_ids.shape:
        raise _no_logits(f"a tensor {list(found.shape)}", input_ids)
    highest = highest_id(input_ids) if highest is None else highest
    if found.shape[2] <= highest:
        raise _no_logits(f"logits of {found.shape[2]} tokens", input_ids, f" of over {highest}")


def _no_logits(found: str, input_ids: Tensor, more: str = "") -> ModelError:
    batch, length = input_ids.shape
    return ModelError(
        f"the model's result is {found}, where a loss needs floating-point logits [{batch}, "
        f"{length}, vocabulary{more}], a row for each token: was its graph or its head changed?"
    )


@torch.no_grad()
def window_losses(
    forward: Callable[[Tensor], Tensor], windows: Tensor, batch_size: int = 1
) -> Iterator[Tensor]:
    """token_nll of each batch of windows, on the CPU; ``forward`` maps input_ids to logits."""
    highest = highest_id(windows)
    for ids in windows.split(batch_size):
        yield token_nll(forward(ids), ids, highest).cpu()


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
