"""attn8, kv8 and kv4 against transformers' own modules in float64 with quantized products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import fxquant
from fxquant.ir.graph import info
from tests.architectures import ARCHITECTURES, padding_mask, token_ids

NAME = "fxquant_reference"
Quantizer = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(NAME, None)


def symmetric(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


def per_token(x: Tensor) -> Tensor:
    return symmetric(x, x.abs().amax(-1, keepdim=True) / 127)


def per_tensor(x: Tensor) -> Tensor:
    return symmetric(x, x.abs().max() / 127)


def affine(x: Tensor, bits: int) -> Tensor:
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    steps: int = 2**bits - 1
    scale = (high - low) / steps
    zero = (low / scale).round()
    codes = torch.clamp((x / scale).round(), zero, zero + steps)
    return codes * scale


def same(x: Tensor) -> Tensor:
    return x


def quantizers(scheme: str, graph: GraphModule, layer: int) -> tuple[Quantizer, ...]:
    """Of q, k, p and v."""
    if "+kv" in scheme:
        bits = int(scheme[-1])
        return same, lambda k: affine(k, bits), same, lambda v: affine(v, bits)
    if "dynamic" in scheme:
        each = per_token if "token" in scheme else per_tensor
        return each, each, each, per_tensor
    path = f"{info(graph).blocks[layer]}.self_attn"
    names = ("qk.left", "qk.right", "pv.left", "pv.right")
    scales = [graph.get_buffer(f"{path}.{name}_scale").double() for name in names]
    return tuple(lambda x, scale=scale: symmetric(x, scale) for scale in scales)


def reference(model: Any, scheme: str, graph: GraphModule, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the float64 module whose attention quantizes its products' operands."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        of_q, of_k, of_p, of_v = quantizers(scheme, graph, module.layer_idx)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scores = of_q(query * (scaling or query.shape[-1] ** -0.5)) @ of_k(key).mT
        weights = (scores + attention_mask[..., : key.shape[-2]]).softmax(-1)
        return (of_p(weights) @ of_v(value)).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    double = copy.deepcopy(model).double()
    double.config._attn_implementation = NAME
    found: Tensor = double(**batch, use_cache=False).logits
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "scheme",
    [
        *("w8a8-dynamic+attn8", "w8a8-dynamic-token+attn8", "w8a8-static:absmax+attn8"),
        *("fp+kv8", "fp+kv4"),
    ],
)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_attention_is_that_of_the_float64_module(name: str, scheme: str) -> None:
    """Only attention is quantized: the linears are overridden to float. Right padding, grouped
    heads (llama). What is left are roundings that fall the other way in fp32."""
    model = ARCHITECTURES[name]()
    batch = {"input_ids": token_ids(3, 11), "attention_mask": padding_mask(3, 11, "right")}
    spelled = scheme
    if "attn8" in scheme:
        spelled = f'{{"scheme": "{scheme}", "overrides": {{"linear": "fp"}}}}'
    graph = fxquant.convert(model, spelled, calibration=[batch])
    kept = batch["attention_mask"].bool()
    floating = fxquant.convert(model, "fp")(**batch)[kept].double()
    found = graph(**batch)[kept].double()
    expected = reference(model, scheme, graph, batch)[kept]
    error = (expected - floating).norm()
    assert float(error) > 1e-4 * float(floating.norm())  # there is something to get right
    assert float((found - expected).norm()) < 0.1 * float(error)
