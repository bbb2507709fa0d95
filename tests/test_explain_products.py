"""explain on schemes whose attention products are sites: left operand first, no weights cause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.analysis import explain
from fxquant.analysis.lab import setting
from fxquant.analysis.local import local_figures
from fxquant.analysis.sites import ProductSite
from fxquant.ir.graph import info
from tests.architectures import token_ids
from tests.test_analysis_parts import laboratory
from tests.test_tracing import traced

CASES = (
    ("opt", "w8a8-dynamic-token+attn8"),
    ("llama", "w8a8-static:p99+attn8+kv8"),
    ("llama", "w8+attn8"),
)


@torch.no_grad()
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_all_parts_are_the_converted_graph(name: str, scheme: str) -> None:
    lab, sites = laboratory(name, scheme)
    assert [each.path.rpartition(".")[2] for each in sites if isinstance(each, ProductSite)] == [
        *("qk", "pv"),
        *("qk", "pv"),
    ]
    graph = fxquant.convert(traced(name)[1], scheme, calibration=[token_ids(2, 16, 5)], level="qdq")
    for ids in lab.windows:
        cut = lab.executor.advance(lab.executor.start(input_ids=ids), instead=setting(sites))
        assert torch.equal(cut.values[lab.executor.nodes[-1]], graph(input_ids=ids))


def clipped(x: Tensor, scale: Tensor) -> Tensor:
    return x.clamp(-127 * scale, 127 * scale)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


@torch.no_grad()
def test_parts_against_float64_left_operand_first() -> None:
    """(clip a - a) b + Q(a) (clip b - b) is clipping, the rest rounding."""
    lab, sites = laboratory("llama", "w8a8-static:p99+attn8", windows=1)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(site: ProductSite, left: Tensor, right: Tensor) -> Tensor:
        seen[site.path] = (left.double(), right.double())
        return site.output(frozenset(site.causes), left, right)

    products = [each for each in sites if isinstance(each, ProductSite)]
    keeping = {each.node: lambda a, b, each=each: keep(each, a, b) for each in products}
    lab.loss({**setting(sites), **keeping})
    figures, _ = local_figures(lab, sites)
    for site in products:
        a, b = seen[site.path]
        scales = [each.scale for each in (site.left, site.right) if each.scale is not None]
        (ca, qa), (cb, qb) = (
            (clipped(x, s.double()), rounded(x, s.double()))
            for x, s in zip((a, b), scales, strict=True)
        )
        clipping = (ca - a) @ b + qa @ (cb - b)
        rounding = (qa - ca) @ b + qa @ (qb - cb)
        assert torch.allclose(clipping + rounding, qa @ qb - a @ b, atol=1e-12)
        found = figures[site.path]
        assert found.energy["weights"] == 0
        assert float(clipping.square().sum()) > 0
        assert found.energy["clipping"] == pytest.approx(float(clipping.square().sum()), rel=1e-3)
        assert found.energy["rounding"] == pytest.approx(float(rounding.square().sum()), rel=1e-3)
        tokens = (clipping + rounding).square().sum((1, 3)).flatten()
        assert torch.allclose(found.tokens[0].double(), tokens, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token+attn8", "w8a8-static:absmax+attn8"])
def test_explain_sums_to_the_loss_difference(scheme: str) -> None:
    graph = traced("llama")[1]
    found = explain(
        graph,
        scheme,
        calibration=[token_ids(2, 16, 5)],
        data=token_ids(2, 20, 50),
        methods=("in_order", "causes", "rescue", "path"),
        worst=20,
    )
    assert {"self_attn.qk", "self_attn.pv"} <= {kind.name for kind in found.kinds}
    total = sum(site.effects["in_order"] for site in found.sites)
    assert total == pytest.approx(found.delta_loss, abs=1e-9)
    choices = {c.choice for c in found.counterfactuals if c.site.endswith((".qk", ".pv"))}
    assert choices == {"float", "left operand in float", "right operand in float"}
    for site in found.sites:
        if site.site.endswith((".qk", ".pv")):
            assert site.energy["weights"] == 0 < site.energy["rounding"]
            assert site.causes is not None
            assert site.causes["weights"] == 0
    assert found.path is not None
    assert found.path.refused is None
    assert "self_attn.qk" in str(found)


def test_sites_may_name_products() -> None:
    graph = traced("opt")[1]
    found = explain(graph, "w8+attn8", data=token_ids(2, 20, 50), sites="*.qk", worst=0)
    expected = [f"{block}.self_attn.qk" for block in info(graph).blocks]
    assert [site.site for site in found.sites] == expected
    rest = explain(graph, "w8+attn8", data=token_ids(2, 20, 50), sites="*.fc1", worst=0)
    assert all(site.site.endswith("fc1") for site in rest.sites)
