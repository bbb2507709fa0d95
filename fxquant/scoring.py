"""The graph as a callable: it takes what a tokenizer returns."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from fxquant.encodings import TAKEN
from fxquant.errors import DataError


class ScoringGraph(GraphModule):
    """``gm(input_ids, attention_mask=None)``, and ``gm(**tokenizer(text, return_tensors="pt"))``.

    ``token_type_ids``, which some tokenizers return, is let go; the graph has no use for it.
    Raises DataError for lists in place of tensors.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("token_type_ids", None)
        named = (*zip(TAKEN, args, strict=False), *kwargs.items())
        for name, value in named:
            if name in TAKEN and isinstance(value, list | tuple | str):
                raise DataError(
                    f"{name} is a {type(value).__name__}: the graph takes tensors [batch, length], "
                    'as tokenizer(text, return_tensors="pt") gives them'
                )
        return super().__call__(*args, **kwargs)
