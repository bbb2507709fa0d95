"""What users hand over as batches: tensors, arrays, lists of ids, what a tokenizer returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fxquant.errors import CalibrationError, FxquantError
from fxquant.ir.counted import counted

TAKEN = ("input_ids", "attention_mask")
# What tokenizers and collators put beside them; none of it changes a causal LM's logits.
UNUSED = frozenset(
    {
        *("token_type_ids", "labels", "special_tokens_mask", "offset_mapping", "length"),
        "overflow_to_sample_mapping",
    }
)
_DEEPEST = 64  # axes of a tensor; a list may even hold itself
TEXT_TO_BATCHES = (
    "tokenizer = fxquant.load_model(name).tokenizer",
    "cut = fxquant.windows(text, tokenizer)",
    "# then calibration=cut.batches, data=cut.evaluation",
)


def is_text(value: object) -> bool:
    """Whether ``value`` is a string, or a list that begins with one, however deep."""
    for _ in range(_DEEPEST):
        if not isinstance(value, list | tuple) or not value:
            break
        value = value[0]
    return isinstance(value, str | bytes)


def text_refused(what: str, error: type[FxquantError] = CalibrationError) -> FxquantError:
    """``what`` is text: the lines that make token windows of it."""
    lines = "\n    ".join(TEXT_TO_BATCHES)
    return error(f"{what} is text, and a graph reads token ids. These lines cut it:\n    {lines}")


def batches_of(
    given: Any, what: str = "calibration", error: type[FxquantError] = CalibrationError
) -> Iterable[Any]:
    """``given`` as an iterable of batches, none of which is looked at.

    One encoding, or one row of ids, is one batch; a tensor or array [N, L] is N windows, [N, b, L]
    N batches. Raises ``error`` for text, a tokenizer and whatever else is not iterable.
    """
    if is_text(given) or isinstance(given, Path):
        raise text_refused(what, error)
    if isinstance(given, Mapping):
        return [given]
    if isinstance(given, Tensor):
        given = _plain(given, what, error)
    if isinstance(given, Tensor | np.ndarray) and given.ndim:
        return [given] if given.ndim == 1 else list(given)
    if isinstance(given, list | tuple) and given and isinstance(given[0], Integral):
        return [given]
    if isinstance(given, Iterable) and not isinstance(given, Tensor | np.ndarray):
        return given
    hint = ""
    if isinstance(given, PreTrainedTokenizerBase):
        hint = f"; what it makes of a text is: {what}=tokenizer(text, return_tensors='pt')"
    elif hasattr(given, "batches") and hasattr(given, "evaluation"):
        hint = f"; pass its .{'batches' if what == 'calibration' else 'evaluation'}"
    elif hasattr(given, "tokenizer"):
        hint = "; cut text with fxquant.windows(text, its .tokenizer)"
    raise error(
        f"{what} is a {type(given).__name__}, not an iterable of batches such as LongTensors "
        f"[batch, length]{hint}"
    )


def encoding(
    batch: Any, where: str, error: type[FxquantError] = CalibrationError
) -> dict[str, Tensor]:
    """A batch's ``input_ids`` and, where it has one, ``attention_mask``: tensors [batch, length].

    A row [length] is a batch of one; ids of any integer dtype become int64. Raises ``error`` for
    text, for rows of several lengths, for inputs that would change the logits and are not taken.
    """
    if isinstance(batch, list | tuple) and len(batch) == 1 and isinstance(batch[0], Tensor):
        batch = batch[0]  # a DataLoader over a TensorDataset
    if is_text(batch):
        raise text_refused(where, error)
    if not isinstance(batch, Mapping):
        batch = {"input_ids": batch}
    elif batch.get("input_ids") is None:
        raise error(f"{where}: no input_ids among {', '.join(map(str, batch)) or 'no inputs'}")
    unknown = [str(name) for name in batch if name not in (*TAKEN, *UNUSED)]
    if unknown:
        raise error(
            f"{where}: the graph takes no input {sorted(unknown)}, only {' and '.join(TAKEN)}"
        )
    found = {
        name: _rows(batch[name], f"{where}: {name}", error)
        for name in TAKEN
        if name == "input_ids" or batch.get(name) is not None
    }
    if _is_integer(found["input_ids"].dtype):
        found["input_ids"] = found["input_ids"].to(torch.int64)
    return found


def _rows(value: Any, where: str, error: type[FxquantError]) -> Tensor:
    if is_text(value):
        raise text_refused(where, error)
    found = value if isinstance(value, Tensor) else _tensor(value, where, error)
    found = _plain(found, where, error)
    return found.unsqueeze(0) if found.dim() == 1 else found


def _plain(value: Tensor, where: str, error: type[FxquantError]) -> Tensor:
    """A tensor of a class that only adds names to torch's, as torch's; ``error`` for another."""
    kind = type(value)
    if value.is_nested:
        raise error(f"{where} is a nested tensor: give a list of its rows, one batch each")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise error(f"{where} must be a dense tensor with values")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise error(f"{where} is a {kind.__name__}, which stands for other values: give a Tensor")
    return value.detach().as_subclass(Tensor)


def _tensor(value: Any, where: str, error: type[FxquantError]) -> Tensor:
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        raise error(
            f"{where} is a list of {counted(len(value), 'tensor')}, whose axes nothing tells (a "
            "DataLoader that collates lists gives them transposed): stack them to one tensor "
            "[batch, length]"
        )
    if not isinstance(value, list | tuple | np.ndarray):
        raise error(
            f"{where}: expected a LongTensor [batch, length], an array or a list of token ids, got "
            f"{type(value).__name__}"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise error(f"{where} is a masked array: give ids, and attention_mask beside them")
    rows = value if isinstance(value, list | tuple) else ()
    lengths = {len(row) for row in rows if isinstance(row, list | tuple) or np.ndim(row)}
    if len(lengths) > 1:
        raise error(
            f"{where} has rows of {min(lengths)} to {max(lengths)} tokens: tokenizer(texts, "
            "padding=True, return_tensors='pt') makes one batch of them, and each row by itself "
            "is a batch too"
        )
    try:
        if isinstance(value, np.ndarray):  # torch takes no foreign order of bytes or elements
            value = value.astype(value.dtype.newbyteorder("="), order="C")
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
        raise error(f"{where} holds no numbers: {reason}") from reason


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
