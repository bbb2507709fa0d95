"""Scales in fp16, as files of blocks hold them, and the graph that has them there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

from fxquant.errors import ExportError
from fxquant.exports.check import Checked, by_attention, compared, in_float32
from fxquant.exports.compressed_rules import take_buffers
from fxquant.exports.sites import recorded_specs
from fxquant.exports.target import Refusal
from fxquant.formats.integer import integer
from fxquant.formats.scales import FP16, FP32
from fxquant.ir.graph import clone_sharing_storage, install
from fxquant.ir.leaves import QuantizedParameters
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.schemes.specs import SiteSpec, TensorSpec
from fxquant.schemes.spelling import spell_site, spell_weight

# fp16 has fewer digits below it: a scale there is off by up to a part in 2^(24 + its exponent).
_FEW_DIGITS: Final = torch.finfo(torch.float16).smallest_normal


def in_half(held: WeightCodes, path: str, minima: bool = False) -> WeightCodes:
    """The same codes under the nearest scales that fp16 holds; their own where they lie there.

    ``minima``: and under which the least number of an asymmetric group is fp16 too.

    Raises ExportError, naming ``path``, for scales beyond the largest that can be held.
    """
    if held.spec.scale == FP16:
        return held
    found = float(held.scales.max())
    most = float(_nearest(torch.tensor(torch.finfo(torch.float32).max), held.spec, minima))
    if found > most:
        raise ExportError(
            f"{path}: a scale of {found:.6g} is beyond {most:.6g}, the largest that the format "
            "keeps (in fp16): divide the weights of the model, or take ONNX (--to onnx)"
        )
    return replace(held, scales=_nearest(held.scales, held.spec, minima))


def _nearest(scales: Tensor, spec: TensorSpec, minima: bool) -> Tensor:
    return FP16.nearest(scales, spec.grid if minima else integer(8))


def scale_refusal(weight: TensorSpec) -> Refusal | None:
    """Why files whose scales are fp16 cannot hold those of ``weight``, None if they can."""
    if not weight.scale.two_level:
        return None
    nearest = spell_site(SiteSpec(replace(weight, scale=FP16)))
    return Refusal("its scales are fp16 numbers, not codes under one in fp32", nearest)


def with_half_scales(gm: GraphModule, *, minima: bool = True) -> GraphModule:
    """A copy of ``gm`` whose weights' scales are those of a file: fp16 numbers, codes unchanged.

    ``minima``: as in GGUF, where the least number of an asymmetric group is fp16 too; GPTQ and AWQ
    keep zero points.

    A scheme with ``-fp16`` behind its groups (``w4-g32-fp16``) has them from the start, and its
    codes are the nearest under them.
    """
    copy = clone_sharing_storage(gm)
    for path, spec in weight_specs(gm).items():
        module = copy.get_submodule(path)
        if not isinstance(module, QuantizedParameters) or spec.scale != FP32:
            continue
        tensors = {name: value for name, value in module._buffers.items() if value is not None}
        scale = _nearest(tensors["weight_scale"], spec, minima)
        install(copy, path, QuantizedParameters({**tensors, "weight_scale": scale}))
    return copy


def weight_specs(gm: GraphModule) -> dict[str, TensorSpec]:
    """How the weight at each coded path is kept, embeddings too."""
    specs = recorded_specs(gm)
    return {path: spec.weight for path, spec in specs.items() if spec.weight is not None}


def moved(gm: GraphModule, minima: bool) -> str:
    """Why the figures of ``gm`` are not those of a file with scales in fp16; "" where they are."""
    count, furthest, few = 0, 0.0, False
    for path, spec in weight_specs(gm).items():
        if spec.scale != FP32:
            continue
        scales = gm.get_submodule(path).get_buffer("weight_scale")
        half = _nearest(scales, spec, minima)
        count += int((half != scales).sum())
        furthest = max(furthest, float(((half - scales) / scales).abs().max()))
        few |= bool((half < _FEW_DIGITS).any())
    if not count:
        return ""
    text = f"{count} scales went to their nearest in fp16, by up to {furthest:.2g} of themselves"
    if few:
        text += " (some are too small for all of its digits)"
    spelled = sorted({spelled_in_half(spec) for spec in weight_specs(gm).values()} - {""})
    take = f"; {' and '.join(spelled)} has them there from the start" if spelled else ""
    return text + take


def spelled_in_half(spec: TensorSpec) -> str:
    """The spelling of the same weight with scales in fp16, "" where there is none."""
    if spec.granularity != "group" or spec.scale != FP32:
        return ""
    return spell_weight(replace(spec, scale=FP16))


def compared_in_half(gm: GraphModule, engine: PreTrainedModel, name: str, minima: bool) -> Checked:
    """transformers' float model of a file beside ``gm``, and beside the graph of the file."""
    ruled = in_float32(with_half_scales(gm, minima=minima))
    reasons = [each for each in (moved(gm, minima), *take_buffers(ruled, gm, engine)) if each]
    compare = partial(
        compared,
        in_float32(gm),
        name,
        lambda ids: engine(input_ids=ids, use_cache=False).logits,
        ruled,
        lambda: "; ".join([*reasons, "float sums in another order"]),
    )
    return by_attention(compare(), engine, compare)
