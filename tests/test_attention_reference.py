"""attn8, kv8 and kv4 against transformers' own modules in float64 with quantized products.

Ours computes in float32, and how that rounds differs from processor to processor: a value that lies
next to a tie between two codes may fall to either. There the float64 module takes the graph's code;
everywhere else its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import fxquant
from fxquant.ir.graph import info
from fxquant.ir.legal_forms import OPS, STORES
from fxquant.run.execution import Executor
from tests.architectures import ARCHITECTURES, padding_mask, token_ids

NAME = "fxquant_reference"
CODES = (OPS.quantize.default, OPS.quantize_to.default)
# Of a value, and of what the graph stored for it.
Quantizer = Callable[[Tensor, Tensor], Tensor]
# A step's fraction. x / scale is at most 255 (kv8's steps); what leads to x (a norm, a projection,
# a softmax) and to its scale is some tens of float32 operations, 2^-24 each.
TIE = 255 * 64 * 2**-24
# With the codes given, only float32 arithmetic differs: some tens of operations, as above.
SAME_CODES = 64 * 2**-24


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(NAME, None)


def rounded(position: Tensor, stored: Tensor) -> Tensor:
    """``position`` to the nearest integer; at a tie, to the one that is ``stored``."""
    return torch.where((position - stored).abs() <= 0.5 + TIE, stored, position.round())


def symmetric(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return rounded(x / scale, codes.double()).clamp(-127, 127) * scale


def per_token(x: Tensor, codes: Tensor) -> Tensor:
    return symmetric(x, codes, x.abs().amax(-1, keepdim=True) / 127)


def per_tensor(x: Tensor, codes: Tensor) -> Tensor:
    return symmetric(x, codes, x.abs().max() / 127)


def affine(x: Tensor, stored: Tensor, bits: int) -> Tensor:
    """``stored``: the values of the codes."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    steps: int = 2**bits - 1
    scale = (high - low) / steps
    zero = (low / scale).round()
    codes = rounded(x / scale, (stored.double() / scale).round())
    return torch.clamp(codes, zero, zero + steps) * scale


def on_float8(x: Tensor, scale: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` on the numbers of a float8 type under ``scale``; ``stored``: the numbers that it is."""
    pattern = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = pattern[pattern.isfinite()].unique()
    steps, stored = x / scale, stored.double()
    nearest = numbers[(steps[..., None] - numbers).abs().argmin(-1)]
    tie = (steps - stored).abs() <= (steps - nearest).abs() + steps.abs() * 64 * 2**-24
    return torch.where(tie, stored, nearest) * scale


def float8(x: Tensor, codes: Tensor, peak: Tensor) -> Tensor:
    """By its codes, under a scale that takes ``peak`` to the end of their type."""
    scale = peak / torch.finfo(codes.dtype).max
    return on_float8(x, scale, codes, codes.dtype)


def kept_float8(x: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """By the values that were stored, one scale a token and head."""
    scale = x.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max
    codes = (stored.double() / scale).float().to(dtype)
    return on_float8(x, scale, codes, dtype)


def same(x: Tensor, _: Tensor) -> Tensor:
    return x


def quantizers(scheme: str, graph: GraphModule, layer: int) -> tuple[Quantizer, ...]:
    """Of q, k, p and v."""
    if "+kv8(" in scheme:
        dtype = torch.float8_e5m2 if "e5m2" in scheme else torch.float8_e4m3fn
        keep = lambda x, s: kept_float8(x, s, dtype)  # noqa: E731
        return same, keep, same, keep
    if "+kv" in scheme:
        bits = int(scheme[-1])
        return same, lambda k, s: affine(k, s, bits), same, lambda v, s: affine(v, s, bits)
    if "format" in scheme and "static" not in scheme:
        token = "token" in scheme or scheme.startswith("fp8")
        whole = lambda x, s: float8(x, s, x.abs().max())  # noqa: E731
        rows = lambda x, s: float8(x, s, x.abs().amax(-1, keepdim=True))  # noqa: E731
        return (rows, rows, rows, whole) if token else (whole, whole, whole, whole)
    if "dynamic" in scheme:
        each = per_token if "token" in scheme else per_tensor
        return each, each, each, per_tensor
    path = f"{info(graph).blocks[layer]}.self_attn"
    names = ("qk.left", "qk.right", "pv.left", "pv.right")
    scales = [graph.get_buffer(f"{path}.{name}_scale").double() for name in names]
    if "format" in scheme:
        return tuple(lambda x, s, c=c: on_float8(x, c, s, s.dtype) for c in scales)
    return tuple(lambda x, s, scale=scale: symmetric(x, s, scale) for scale in scales)


def run_recording(graph: GraphModule, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what each quantizer of attention gave: q, k, p, v or k, v of each layer."""
    stored: list[Tensor] = []

    def on_node(node: Node, value: Any) -> Any:
        if node.target in (*CODES, *STORES):
            stored.append(value)
        return value

    logits: Tensor = Executor(graph).run(on_node, **batch)
    return logits, stored


def reference(
    model: Any, scheme: str, graph: GraphModule, batch: dict[str, Tensor], stored: list[Tensor]
) -> Tensor:
    """Logits of the float64 module whose attention quantizes its products' operands."""
    if "+kv" in scheme:  # q and p are not quantized
        stored = [t for k, v in zip(stored[::2], stored[1::2], strict=True) for t in (k, k, v, v)]
    given = iter(stored)

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
        q, k, p, v = (next(given) for _ in range(4))
        scores = of_q(query * (scaling or query.shape[-1] ** -0.5), q) @ of_k(key, k).mT
        weights = (scores + attention_mask[..., : key.shape[-2]]).softmax(-1)
        return (of_p(weights, p) @ of_v(value, v)).transpose(1, 2).contiguous(), None

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
        *("fp+kv8", "fp+kv4", "fp+kv8(format=fp8)", "fp+kv8(format=e5m2)"),
        *("fp8+attn8(format=fp8)", "w8a8-dynamic+attn8(format=e5m2)"),
        *("w8a8-static:absmax+attn8(format=e4m3)", "w8a8-dynamic-token+attn8(format=e4m3)"),
    ],
)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_attention_is_that_of_the_float64_module(name: str, scheme: str) -> None:
    """Only attention is quantized: the linears are overridden to float. Right padding, grouped
    heads (llama)."""
    model = ARCHITECTURES[name]()
    batch = {"input_ids": token_ids(3, 11), "attention_mask": padding_mask(3, 11, "right")}
    spelled = scheme
    if "attn8" in scheme:
        spelled = f'{{"scheme": "{scheme}", "overrides": {{"linear": "fp"}}}}'
    graph = fxquant.convert(model, spelled, calibration=[batch])
    kept = batch["attention_mask"].bool()
    floating = fxquant.convert(model, "fp")(**batch)[kept].double()
    found, stored = run_recording(graph, batch)
    expected = reference(model, scheme, graph, batch, stored)[kept]
    size = float(floating.norm())
    assert float((expected - floating).norm()) > 1e-4 * size  # there is something to get right
    assert float((found[kept].double() - expected).norm()) <= SAME_CODES * size
