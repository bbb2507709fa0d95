"""Which types the tensors of a GGUF file have, kept beside the weights that are read from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fxquant.files.doors import read_object

# No .json: it says nothing of the model that the weights do not, and is no part of its identity.
WEIGHTS = "gguf_types"
# (bits of a code, values a scale) of llama.cpp's block formats, where one scale (and offset) rules.
_BLOCKS = {
    "Q4_0": (4, 32),
    "Q4_1": (4, 32),
    "Q5_0": (5, 32),
    "Q5_1": (5, 32),
    "Q8_0": (8, 32),
    "Q2_K": (2, 16),
    "Q3_K": (3, 16),
    "Q4_K": (4, 32),
    "Q5_K": (5, 32),
    "Q6_K": (6, 16),
    "IQ4_NL": (4, 32),
    "MXFP4": (4, 32),
}
_FLOATS = ("F32", "F16", "BF16", "F64")


def tensor_types(file: Path) -> dict[str, int]:
    """Number of values of each tensor type in a GGUF file, the most frequent first."""
    from gguf import GGUFReader

    counts: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(counts.most_common())


def write_weights(file: Path, folder: Path) -> None:
    """Keep the tensor types of ``file`` in ``folder``; gguf has to be installed."""
    (folder / WEIGHTS).write_text(json.dumps(tensor_types(file), indent=1) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> str:
    """What ``write_weights`` kept, in words; "" where there is nothing."""
    file = folder / WEIGHTS
    if not file.is_file():
        return ""
    return in_words(read_object(file))


def in_words(counts: Mapping[str, int]) -> str:
    """Such as "dequantized from GGUF: 79.00% Q4_1 (groups of 32 with at most 16 values each)"."""
    whole = sum(counts.values())
    kinds = [f"{count / whole:.2%} {_described(name)}" for name, count in counts.items()]
    how = "read" if set(counts) <= set(_FLOATS) else "dequantized"
    return f"{how} from GGUF: {', '.join(kinds)}"


def _described(name: str) -> str:
    if name not in _BLOCKS:
        return name
    bits, group = _BLOCKS[name]
    return f"{name} (groups of {group} with at most {2**bits} values each)"


def weights_note(model: str, weights: str) -> str:
    """What has to be said below figures of such a model; or ""."""
    if not weights.startswith("dequantized"):
        return ""
    return (
        f"The weights of {model} are {weights}: fp is that model, not the one it was made from, "
        "and a scheme loses only what its grid does not share with that one (docs/evaluation.md)."
    )
