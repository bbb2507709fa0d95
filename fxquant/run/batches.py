"""Token batches, checked against the graph that will read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import CalibrationError, DataError, FxquantError
from fxquant.ir.counted import counted
from fxquant.ir.graph import GraphInfo
from fxquant.run.encodings import encoding

# Arrays count as sequences; text does too, and is refused.
Batch = Tensor | Mapping[str, Any] | Sequence[Any]
Batches = Iterable[Batch]


def model_inputs(batch: Batch, facts: GraphInfo, index: int) -> dict[str, Tensor]:
    """``{"input_ids": int64 [batch, length], "attention_mask": ...}``, checked.

    Raises CalibrationError naming batch ``index``: wrong type or shape, unknown inputs, ids
    outside the vocabulary, more positions than the model has.
    """
    where = f"batch {index}"
    given = encoding(batch, where)
    ids = given["input_ids"]
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise CalibrationError(
            f"{where}: input_ids must be integers [batch, length], got {ids.dtype} "
            f"{list(ids.shape)}"
        )
    if ids.numel() == 0:
        raise CalibrationError(f"{where}: input_ids {list(ids.shape)} hold no token")
    check_ids(ids, facts, where, CalibrationError)
    mask = given.get("attention_mask")
    if mask is None:
        return {"input_ids": ids}
    check_mask(mask, ids, where)
    return {"input_ids": ids, "attention_mask": mask}


def check_mask(
    mask: Tensor, ids: Tensor, where: str, error: type[FxquantError] = CalibrationError
) -> None:
    """Raise ``error`` for a mask of another shape than ids [batch, length], or of anything but 0
    and 1 (or bools).

    Other integers, token ids say, would count as attended, and NaN too.
    """
    if mask.shape != ids.shape:
        raise error(
            f"{where}: attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}"
        )
    if mask.is_complex():
        raise error(f"{where}: attention_mask must be a dense tensor of 0 and 1")
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        first = wrong[0].item()
        guess = " (token ids?)" if not mask.is_floating_point() else ""
        raise error(
            f"{where}: attention_mask must be 0 (padding) and 1, found {first} at {wrong.numel()} "
            f"of {mask.numel()} places{guess}"
        )


def check_ids(
    ids: Tensor, facts: GraphInfo, where: str, error: type[FxquantError] = DataError
) -> None:
    """Raise ``error`` for ids outside the vocabulary or rows longer than the positions."""
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= facts.vocab_size:
            raise error(
                f"{where}: token ids {low}..{high} are outside the vocabulary of "
                f"{facts.vocab_size}: was another model's tokenizer used?"
            )
    if facts.max_positions is not None and ids.shape[1] > facts.max_positions:
        raise error(
            f"{where}: rows of {counted(ids.shape[1], 'token')}, but the model has "
            f"{counted(facts.max_positions, 'position')}; cut shorter windows"
        )
