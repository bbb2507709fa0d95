"""Quantized linears that an analysis computes in int8: the integer graph's own function."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import fxquant
from fxquant.analysis import int8_product
from fxquant.analysis.inputs import observed_graph
from fxquant.analysis.int8_product import Int8Product
from fxquant.analysis.parts import EVERY_PART
from fxquant.analysis.sites import LinearSite, simulated_sites
from fxquant.formats.integer import integer
from fxquant.numerics.gemm import reference_int_gemm
from fxquant.numerics.quantizer import Quantizer
from fxquant.run.loss import token_nll
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec
from tests.architectures import token_ids
from tests.test_tracing import traced

IN_INT8 = ("w8a8-static:p99", "w8a8-static-asym", "w4a8-dynamic-token", "w4-tensor/a8-dynamic-asym")
IN_FLOAT = ("w8-asym/a8-dynamic", "w4-g16/a8-dynamic", "w8")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sites and processors without such instructions too: their route has the same sums."""
    monkeypatch.setattr(int8_product, "PAYS", 1)
    monkeypatch.setattr(int8_product, "exact_int_mm", lambda: True)


def sites_of(name: str, scheme: str, dtype: torch.dtype = torch.float32) -> list[LinearSite]:
    graph = (
        fxquant.trace(copy.deepcopy(traced(name)[0]).to(dtype))
        if dtype != torch.float32
        else traced(name)[1]
    )
    calibration = [{"input_ids": token_ids(2, 16, 5)}]
    observed = observed_graph(graph, Scheme.parse(scheme), calibration, False)
    found = simulated_sites(observed, Scheme.parse(scheme))
    return [each for each in found if isinstance(each, LinearSite)]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("scheme", IN_INT8)
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_the_loss_is_that_of_the_integer_graph(name: str, scheme: str) -> None:
    graph, data = traced(name)[1], token_ids(2, 20, 50)
    given: dict[str, Any] = {"calibration": [token_ids(2, 16, 5)]}
    assert all(each.product8 is not None for each in sites_of(name, scheme))
    found = fxquant.explain(graph, scheme, data=data, methods=("causes",), worst=0, **given)
    integer = fxquant.convert(graph, scheme, **given)
    losses = [token_nll(integer(input_ids=ids), ids) for ids in data.split(1)]
    assert found.loss_quantized == pytest.approx(float(torch.cat(losses).double().mean()), rel=1e-7)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("scheme", IN_INT8)
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_a_site_has_the_output_of_its_codes(name: str, scheme: str) -> None:
    """Up to the rounding of a float sum of K products; NaN stays in its row, infinity is clipped
    by a static range and nothing else."""
    for each in sites_of(name, scheme)[:4]:
        x = 3 * torch.randn(2, 5, each.weight.shape[1])
        assert each.quantizer is not None
        known = torch.nn.functional.linear(each.quantizer(x), each.coded_weight, each.bias)
        size = each.quantizer(x).abs().amax() * each.coded_weight.abs().sum(1).amax()
        bound = 2 * x.shape[-1] * torch.finfo(torch.float32).eps * float(size)
        found = each.output(EVERY_PART, x)
        assert found.dtype == torch.float32
        assert float((found - known).abs().max()) <= bound
        x[1, 2, 3] = math.nan
        nan_rows = each.output(EVERY_PART, x).isnan().all(-1)
        assert bool(nan_rows[1, 2])
        if each.quantizer.scale is not None:
            assert int(nan_rows.sum()) == 1


def test_sums_beyond_24_bits_are_exact_without_the_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    x = torch.randint(60, 128, (8, 8192)).to(torch.int8)
    weight = torch.randint(60, 128, (16, 8192)).to(torch.int8)
    one = torch.ones(())
    own = Int8Product(weight, one, weight.sum(1, dtype=torch.int32))
    found = own(Quantizer(TensorSpec(integer(8), "tensor"), one), x.to(torch.float32), None)
    assert torch.equal(found, reference_int_gemm(x, weight).to(torch.float32))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("scheme", IN_FLOAT)
def test_other_functions_stay_in_float(scheme: str) -> None:
    assert all(each.product8 is None for each in sites_of("llama", scheme))


@pytest.mark.usefixtures("everywhere")
def test_a_model_in_half_precision_stays_in_float() -> None:
    assert all(each.product8 is None for each in sites_of("llama", IN_INT8[0], torch.bfloat16))


def test_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(each.product8 is None for each in sites_of("llama", IN_INT8[0]))
    monkeypatch.setattr(int8_product, "PAYS", 1)
    monkeypatch.setattr(int8_product, "exact_int_mm", lambda: False)
    assert all(each.product8 is None for each in sites_of("llama", IN_INT8[0]))
