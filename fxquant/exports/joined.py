"""Linears that vLLM joins into one: what they have to share there, and where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch.fx import GraphModule

from fxquant.exports.compressed_forms import NV4, form_of
from fxquant.exports.sites import coded_sites
from fxquant.ir.counted import counted
from fxquant.numerics.weight_codes import GLOBAL_SCALE

# The first of those that are joined, and the others.
_JOINED: Final = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}


def joined_to(path: str) -> Iterator[str]:
    """The paths of linears that are joined to ``path``; none where it is not the first of them."""
    parent, dot, own = path.rpartition(".")
    for other in _JOINED.get(own, ()):
        yield f"{parent}{dot}{other}"


def global_scales_apart(gm: GraphModule) -> str:
    """What vLLM makes of joined linears whose global scales differ, in words; "" where none do."""
    divisors = {
        site.path: 1.0 / float(getattr(gm.get_submodule(site.path), GLOBAL_SCALE))
        for site in coded_sites(gm)
        if form_of(site.weight_spec, site.site.shape[1]) is NV4
    }
    shrunk: list[float] = []
    for path in divisors:
        together = [divisors[each] for each in (path, *joined_to(path)) if each in divisors]
        shrunk += [max(together) / each for each in together if each < max(together)]
    if not shrunk:
        return ""
    return (
        "vLLM joins q_proj, k_proj and v_proj, and gate_proj and up_proj, into one linear each, "
        f"and divides it by its largest global scale: {counted(len(shrunk), 'linear')} of this "
        f"model would come out too small there, by up to {max(shrunk):.3g} times; run it in "
        "transformers"
    )
