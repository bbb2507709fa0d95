"""Every matrix of the decoder blocks: which site it belongs to, and which stay in float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from fxquant.ir.blocks import block_of
from fxquant.ir.graph import info
from fxquant.ir.leaves import FloatColumns, QuantizedParameters
from fxquant.numerics.weight_codes import GLOBAL_SCALE


@dataclass(frozen=True)
class Matrix:
    """A weight of two dimensions or more inside the blocks; ``site`` None where it is at none.

    Attributes:
        path: of the parameter, or of the site.
        weights: how many it has.
        tensors: what is stored for it: the float values, or codes with their scales.
        coded: whether it is codes.
    """

    path: str
    site: str | None
    weights: int
    tensors: tuple[Tensor, ...]
    coded: bool


def block_matrices(gm: GraphModule) -> Iterator[Matrix]:
    """Matrices that the graph uses below its blocks, sites first, as ``name_sites`` found them.

    Convolutions, embeddings and parameters of a module's own count, vectors do not.
    """
    facts = info(gm)
    columns = {m.site: m.weight for m in gm.modules() if isinstance(m, FloatColumns)}
    taken: set[int] = set()
    for site in facts.sites:
        if site.role == "linear":
            tensors = _of_site(gm, site.path)
            taken |= {id(tensor) for tensor in tensors}
            if site.path in columns:
                tensors = (*tensors, columns[site.path])
            coded = isinstance(gm.get_submodule(site.path), QuantizedParameters)
            yield Matrix(site.path, site.path, site.shape[0] * site.shape[1], tensors, coded)
    for path, parameter in gm.named_parameters():
        inside = block_of(path, facts.blocks) is not None
        if inside and parameter.dim() > 1 and id(parameter) not in taken:
            yield Matrix(path, None, parameter.numel(), (parameter,), False)


def float_share(gm: GraphModule) -> float:
    """Share of the blocks' weights that stay in float, 0..1; nan where no site is codes."""
    found = list(block_matrices(gm))
    if not any(matrix.coded for matrix in found):
        return float("nan")
    left = sum(matrix.weights for matrix in found if not matrix.coded)
    return left / sum(matrix.weights for matrix in found)


def share_words(share: float) -> str:
    """``12.5% of the blocks' weights stay in float``."""
    return f"{share:.1%} of the blocks' weights stay in float"


def _of_site(gm: GraphModule, path: str) -> tuple[Tensor, ...]:
    module = gm.get_submodule(path)
    names = ["weight"]
    if isinstance(module, QuantizedParameters):
        names += ["weight_scale", "weight_zero_point", GLOBAL_SCALE]
    found = (module._parameters.get(n, module._buffers.get(n)) for n in names)
    return tuple(value for value in found if isinstance(value, Tensor))
