"""Float routes on the CPU: attention in blocks of queries, a linear by another library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fxquant
from fxquant.numerics.gemm import reduced_precision
from fxquant.numerics.kernels import cpu_linear
from fxquant.numerics.kernels.cpu_attention import causal_attention
from tests.architectures import llama, token_ids

attention = torch.ops.fxquant.attention.default


def operands(length: int, dtype: torch.dtype, width: int = 16) -> tuple[Tensor, ...]:
    """As a model has them: views of [batch, length, heads, width]."""
    generator = torch.Generator().manual_seed(length)
    shape = (2, length, 3, width)
    made = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    return tuple(made)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 64, 129, 200, 512, 767, 768])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_blocks_of_queries_are_causal_attention(length: int, scale: float | None) -> None:
    query, key, value = operands(length, torch.float32)
    found = causal_attention(query, key, value, scale)
    expected = scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, scale=scale
    )
    # Weighted means of numbers below 5: some roundings of float32.
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert found.transpose(1, 2).is_contiguous()
    assert found.equal(attention(query, key, value, None, scale))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_of_queries_round_once(dtype: torch.dtype) -> None:
    query, key, value = operands(300, dtype)
    found = causal_attention(query, key, value, None)
    expected = scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True
    )
    # Scores, shares and the result are rounded where the kernel stores them.
    assert found.dtype == dtype
    assert torch.allclose(found.float(), expected, atol=8 * torch.finfo(dtype).eps)


@torch.no_grad()
def test_what_is_behind_a_query_does_not_reach_it() -> None:
    query, key, value = operands(200, torch.float32)
    found = causal_attention(query, key, value, None)
    key[:, :, 150:], value[:, :, 150:] = 9, 1e4
    changed = causal_attention(query, key, value, None)
    assert changed[:, :, :150].equal(found[:, :, :150])
    assert not torch.isclose(changed[:, :, 150:], found[:, :, 150:]).any()


def test_attention_has_its_derivative() -> None:
    query, key, value = operands(140, torch.float32)
    asked = query.clone().requires_grad_(True)
    attention(asked, key, value, None, None).sum().backward()
    assert asked.grad is not None
    assert asked.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 200])
def test_attention_under_autocast_is_torchs_compiled_or_not(length: int) -> None:
    """A rotary embedding makes its operands float32, beside values in bfloat16."""
    query, key, value = operands(length, torch.float32)
    given = (query, key, value.bfloat16(), None, None)
    compiled = torch.compile(lambda *call: attention(*call), backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = scaled_dot_product_attention(*given[:3], is_causal=True)
        assert attention(*given).equal(wanted)
        assert compiled(*given).equal(wanted)
    assert wanted.dtype == torch.bfloat16


@torch.no_grad()
def test_a_graph_is_the_model_where_blocks_are_taken() -> None:
    model, ids = llama(), token_ids(2, 200)
    found, expected = fxquant.trace(model)(input_ids=ids), model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 77])
def test_a_linear_is_the_same_by_either_library(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator)
    weight = torch.randn(130, 96, generator=generator)[7:]  # a slice, as of a vocabulary
    offset = torch.randn(123, generator=generator) if bias else None
    found = cpu_linear.linear(x, weight, offset)
    expected = torch.nn.functional.linear(
        x.double(), weight.double(), None if offset is None else offset.double()
    )
    assert torch.allclose(found.double(), expected, atol=96 * 5 * 2**-23)


def test_why_another_library_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    why = cpu_linear.without_onednn
    assert "other dtypes" in why(x.bfloat16(), weight, None)
    assert "gradient" in why(x.requires_grad_(True), weight, None) or why(x, weight, None)
    x = x.detach()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "AVX-512" in why(x, weight, None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert why(x, weight, None) == ""
    assert not reduced_precision("cpu")
    with torch.autocast("cpu"):
        assert "precision" in why(x, weight, None)
    assert "no CPU" in why(x.to("meta"), weight, None)
