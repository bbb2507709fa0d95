"""W4A8 and W8A8 with groups, end to end: int32 within each group, rescaled per group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Node

import fxquant
from fxquant.formats.packing import unpack_int4
from fxquant.ir.graph import get_tensor, is_op, site_outputs
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import operands
from fxquant.run.execution import Executor
from tests.architectures import gpt2, llama, opt, padding_mask, token_ids

WEIGHTS = ["w4-g16", "w4-g16-asym", "w8-g16", "w8-g24-asym", "w4-g12"]  # 24 and 12 leave a rest
ACTIVATIONS = ["a8-dynamic-token", "a8-dynamic-asym", "a8-static:absmax", "a8-static-asym:absmax"]


def _value(values: dict[Node, Any], node: Any) -> torch.Tensor | None:
    return values[node] if isinstance(node, Node) else None


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_site_is_the_sum_of_its_groups(weight: str, activation: str) -> None:
    """From codes, scales and zero points in float64; the int32 sum of each group is exact."""
    inputs = {"input_ids": token_ids(2, 9), "attention_mask": padding_mask(2, 9, "left")}
    graph = fxquant.convert(opt(), f"{weight}/{activation}", calibration=[inputs])
    values: dict[Node, Any] = {}

    def keep(node: Node, value: Any) -> Any:
        values[node] = value
        return value

    Executor(graph).run(keep, **inputs)
    grouped = [n for n in graph.graph.nodes if is_op(n, OPS.grouped_gemm.default)]
    assert len(grouped) == sum(site.role == "linear" for site, _ in site_outputs(graph)) == 12
    for node in grouped:
        call = operands(node)
        size = call.group_size
        x, codes = values[call.x_codes].double(), values[call.weight_codes].double()
        scales = values[call.weight_scale].double()
        zero, shift = _value(values, call.zero_point), _value(values, call.weight_zero_point)
        expected = torch.zeros(*x.shape[:-1], len(codes), dtype=torch.float64)
        for g in range(scales.shape[1]):
            columns = slice(g * size, (g + 1) * size)
            left = x[..., columns] - (0 if zero is None else zero)
            right = codes[:, columns] - (0 if shift is None else shift[:, g : g + 1])
            expected += (left @ right.T) * scales[:, g]
        # One fp32 rounding for each group's product and each addition.
        bound = 2e-7 * scales.shape[1] * expected.abs().max()
        assert bool(((values[node].double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("scheme", ["w4-g16-asym/a8-dynamic-token", "w8-g16/a8-dynamic"])
@pytest.mark.parametrize("build", [opt, gpt2, llama])
def test_integers_equal_their_simulation(scheme: str, build: Any) -> None:
    ids, found = token_ids(2, 9), []
    for level in ("qdq", "integer"):
        with torch.no_grad():
            found.append(fxquant.convert(build(), scheme, level=level)(input_ids=ids))
    assert (found[0] - found[1]).abs().max() <= 0.02 * found[0].abs().max()
    with torch.no_grad():
        expected = fxquant.convert(build(), "fp")(input_ids=ids)
    assert (found[1] - expected).norm() <= 0.25 * expected.norm()


def test_w4_is_stored_in_half_a_byte() -> None:
    graph = fxquant.convert(llama(), "w4-g16-asym/a8-dynamic-token")
    for node in graph.graph.nodes:
        if is_op(node, OPS.unpack_int4.default):
            call = operands(node)
            packed = get_tensor(graph, call.packed)
            assert packed.dtype == torch.uint8
            assert packed.shape[1] * 2 == call.length
            assert int(unpack_int4(packed, call.length).abs().max()) <= 8
