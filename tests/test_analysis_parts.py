"""The simulation is the converted graph, and its parts add up."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import fxquant
from fxquant.analysis.floor import floor_energy
from fxquant.analysis.inputs import as_batches, observed_graph
from fxquant.analysis.lab import FLOAT_SETTING, Lab, setting
from fxquant.analysis.local import LocalFigures, _record, local_figures, stretch
from fxquant.analysis.parts import CAUSES, subsets
from fxquant.analysis.sites import LinearSite, SimulatedSite, places, simulated_sites
from fxquant.formats.integer import integer
from fxquant.ir.graph import source_of
from fxquant.numerics.quantizer import Quantizer
from fxquant.run.head import final_head, head_nll
from fxquant.run.loss import token_nll
from fxquant.schemes.scheme import Scheme
from fxquant.schemes.specs import TensorSpec
from tests.architectures import opt, token_ids
from tests.environments import by_version
from tests.test_tracing import traced

SCHEMES = (
    "w8",
    "w4-g16-asym",
    "w3-tensor",
    "w8a8-dynamic",
    "w4-g16-asym/a8-dynamic-token-asym",
    "w8a8-static:p99",
    "w8a8-static-asym:mse",
    "w6/a4-static-asym:absmax",
    '{"scheme": "w8a8-static", "overrides": {"embeddings": "w4", "head": "w8a8-dynamic-token"}}',
)


def laboratory(name: str, scheme: str, windows: int = 2) -> tuple[Lab, tuple[SimulatedSite, ...]]:
    """Sites of a tiny random model, and windows that are not the calibration's."""
    _, graph = traced(name)
    parsed = Scheme.parse(scheme)
    batches = as_batches([token_ids(2, 16, 5)], graph)
    observed = observed_graph(graph, parsed, batches, False)
    ids = tuple(token_ids(1, 20, 50 + index) for index in range(windows))
    return Lab(observed, ids), simulated_sites(observed, parsed)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("opt", scheme) for scheme in SCHEMES),
        *(("gpt2", scheme) for scheme in SCHEMES[1:8:2]),
        *(("llama", scheme) for scheme in SCHEMES[::2]),
        ("gemma2-eager", by_version(SCHEMES[-1], SCHEMES[0])),  # 5: no site for its embedding
        ("phi", SCHEMES[4]),
    ],
)
def test_all_parts_are_the_converted_graph(name: str, scheme: str) -> None:
    lab, sites = laboratory(name, scheme)
    _, graph = traced(name)
    qmodel = fxquant.convert(graph, scheme, calibration=[token_ids(2, 16, 5)], level="qdq")
    for ids in lab.windows:
        cut = lab.executor.advance(lab.executor.start(input_ids=ids), instead=setting(sites))
        found = cut.values[lab.executor.nodes[-1]]
        assert torch.equal(found, qmodel(input_ids=ids))
        floating = lab.executor.run(input_ids=ids)
        assert torch.equal(floating, graph(input_ids=ids))
        assert not torch.equal(floating, found)


@torch.no_grad()
@pytest.mark.parametrize(
    "scheme",
    ["w8a8-static:p99+smooth", "w4-g16-asym/a8-dynamic-token+gptq", "w3/a8-static+smooth+gptq"],
)
def test_repaired_sites_are_the_converted_graph(scheme: str) -> None:
    """Changed weights, and codes that a repair chose."""
    lab, sites = laboratory("llama", scheme)
    _, graph = traced("llama")
    qmodel = fxquant.convert(graph, scheme, calibration=[token_ids(2, 16, 5)], level="qdq")
    for ids in lab.windows:
        cut = lab.executor.advance(lab.executor.start(input_ids=ids), instead=setting(sites))
        assert torch.equal(cut.values[lab.executor.nodes[-1]], qmodel(input_ids=ids))


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_parts_sum_to_the_error_of_each_site(name: str, scheme: str) -> None:
    lab, sites = laboratory(name, scheme, windows=1)
    seen: list[str] = []

    def check(site: SimulatedSite, x: Tensor) -> Tensor:
        exact, found = site.output(frozenset(), x), site.output(frozenset(site.causes), x)
        parts = site.errors(x)
        assert parts.keys() <= set(site.causes)
        total = torch.stack(list(parts.values())).sum(0)
        # Dot products of K terms in float32, each sum rounded by some sqrt(K) * 2^-24.
        scale = float(exact.abs().max() + found.abs().max())
        assert float((found - exact - total).abs().max()) <= 5e-6 * scale
        if isinstance(site, LinearSite) and site.quantizer is not None:
            split = site.quantizer.split(x)
            assert torch.equal(site.quantizer(x), split.rounded)
            both = (split.clipped - x) + (split.rounded - split.clipped)
            assert float((both - (split.rounded - x)).abs().max()) <= 1e-6 * float(x.abs().max())
        seen.append(site.path)
        return found

    lab.loss({each.node: lambda x, each=each: check(each, x) for each in sites})
    assert seen == [each.path for each in sites]


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=40),
    limit=st.floats(0.01, 2e3),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_clipping_ends_where_rounding_begins(
    values: list[float], limit: float, bits: int, symmetric: bool
) -> None:
    x = torch.tensor(values).view(1, -1)
    qmax = 2 ** (bits - 1) - 1
    qmin = -qmax if symmetric else -qmax - 1
    scale = torch.tensor(limit / (qmax - qmin), dtype=torch.float32)
    shift = None if symmetric else torch.tensor(min(qmin + 1, qmax), dtype=torch.int32)
    quantizer = Quantizer(TensorSpec(integer(bits, symmetric), "tensor"), scale, shift)
    split = quantizer.split(x)
    # Rounding is at most half a step, where codes are exact in float32 to some 2^-24 of x.
    slack = 1e-6 * float(x.abs().max() + limit)
    assert float((split.rounded - split.clipped).abs().max()) <= float(scale) / 2 + slack
    low, high = (float((q - (shift or 0)) * scale) for q in (qmin, qmax))
    inside = (x >= low) & (x <= high)
    assert torch.equal(split.clipped[inside], x[inside])
    assert bool(((split.clipped == low) | (split.clipped == high) | inside).all())


def test_sixteen_bits_keep_the_range() -> None:
    x = torch.linspace(-3, 5, 999).view(1, -1)
    for symmetric, shift in ((True, None), (False, torch.tensor(-28, dtype=torch.int32))):
        spec = TensorSpec(integer(8, symmetric), "tensor")
        own = Quantizer(spec, torch.tensor(0.02), shift)
        finer = own.with_bits(16)
        coarse, fine = own.split(x), finer.split(x)
        assert float((coarse.clipped - fine.clipped).abs().max()) <= 0.02 / 256
        ratio = float(
            (fine.rounded - fine.clipped).norm() / (coarse.rounded - coarse.clipped).norm()
        )
        assert ratio < 1 / 100  # 2^-8, with the rest of float32


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "llama", "gemma2-eager"])
def test_the_loss_without_logits_is_the_loss(name: str) -> None:
    """gemma2 caps its logits, so its head may not be taken out."""
    lab, _ = laboratory(name, "w8")
    plain = torch.cat([token_nll(lab.executor.run(input_ids=ids), ids) for ids in lab.windows])
    assert (final_head(lab.gm) is None) == (name == "gemma2-eager")
    assert lab.loss(FLOAT_SETTING) == pytest.approx(float(plain.mean()), rel=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_head_nll_over_several_slices(grad: bool) -> None:
    """Also where a slice of the vocabulary is masked by a bias of -inf, and one row is NaN."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 9000)
    x = torch.randn(2, 7, 16, generator=generator)
    ids = torch.randint(9000, (2, 7), generator=generator)
    ids[0, 1:4] = torch.tensor([0, 4096, 8999])
    with torch.no_grad():
        head.bias[2048:4096] = -torch.inf
        ids[(ids >= 2048) & (ids < 4096)] += 4096
    x[1, 3] = torch.nan
    with torch.set_grad_enabled(grad):
        found, expected = head_nll(x, head, ids), token_nll(head(x), ids)
    # Sums of 9,000 terms: float32's rounding of a logarithm near 9, a few times.
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)
    assert found.isnan().sum() == 1
    if grad:
        kept = found.isfinite()
        weight = torch.randn(int(kept.sum()), generator=generator)
        one, other = (
            torch.autograd.grad((nll[kept] * weight).sum(), head.weight)[0]
            for nll in (found, expected)
        )
        assert torch.allclose(one.nan_to_num(), other.nan_to_num(), atol=1e-5)


def kinds_of(gm: GraphModule, sites: tuple[SimulatedSite, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, place in places(gm, sites).items():
        found.setdefault(place.kind, []).append(path)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opt", ["self_attn.q_proj/k_proj/v_proj", "self_attn.out_proj", "fc1", "fc2"]),
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        (
            "llama",
            [
                "self_attn.q_proj/k_proj/v_proj",
                "self_attn.o_proj",
                "mlp.gate_proj/up_proj",
                "mlp.down_proj",
            ],
        ),
    ],
)
def test_kinds_are_found_by_structure(name: str, expected: list[str]) -> None:
    lab, sites = laboratory(name, "w8")
    kinds = kinds_of(lab.gm, sites)
    assert list(kinds) == expected
    for paths in kinds.values():
        by_source: dict[object, int] = {}
        for each in sites:
            if each.path in paths:
                source = source_of(each.node)
                by_source[source] = by_source.get(source, 0) + 1
        assert len(set(by_source.values())) == 1
        assert len(by_source) == 2  # both blocks


def test_stretch_telescopes_to_one() -> None:
    shares = stretch(torch.tensor([1.0, -0.0, 10.0, 2.0]))
    assert float(shares.sum()) == pytest.approx(1)
    assert shares.tolist() == pytest.approx([0.01, 0, 0.96, 0.03])
    tied = stretch(torch.tensor([[1.0, 2, 2, 0], [3, 3, 3, 3]]))
    assert tied.tolist()[0] == pytest.approx([0.25, 0.375, 0.375, 0])
    assert tied.tolist()[1] == pytest.approx([0.25] * 4)


@torch.no_grad()
def test_beyond_a_static_range_nothing_is_blamed_for_rounding() -> None:
    """A channel, and a token, that reach 50 times the range, as all others reach its end."""
    _, sites = laboratory("opt", "w8a8-static:absmax")
    site = sites[0]
    assert isinstance(site, LinearSite)
    assert site.quantizer is not None
    scale = torch.tensor(0.1)
    site = replace(site, quantizer=replace(site.quantizer, scale=scale))
    columns = site.site.shape[1]
    x = torch.rand(columns, columns, generator=torch.Generator().manual_seed(0)) * 12
    x.fill_diagonal_(13)  # beyond the end, 12.7, in every channel and token
    plain, planted = LocalFigures(), LocalFigures()
    _record(plain, site, x)
    x[3, 5] = 635
    _record(planted, site, x)
    for before, after, at in (
        (plain.blame, planted.blame, 5),
        (plain.token_blame[0], planted.token_blame[0], 3),
    ):
        assert before is not None
        assert after is not None
        gained = after - before
        clipping = planted.energy["clipping"] - plain.energy["clipping"]
        assert float(gained[at]) == pytest.approx(clipping, rel=0.05)
        others = torch.cat([gained[:at], gained[at + 1 :]])
        assert float(others.abs().max()) <= 0.05 * float(before.max())
        # All reach the end of the range: rounding is laid at them evenly.
    assert plain.blame is not None
    rounding = plain.blame - plain.channels["clipping"] - plain.channels["weights"]
    assert torch.allclose(rounding, rounding.mean().expand(columns), rtol=1e-3)


@torch.no_grad()
def test_local_figures_against_a_plain_computation() -> None:
    lab, sites = laboratory("opt", "w8a8-static:p99")
    figures, loss = local_figures(lab, sites)
    assert loss == pytest.approx(lab.loss(setting(sites)), abs=1e-12)
    inputs: dict[str, list[Tensor]] = {each.path: [] for each in sites}

    def keep(site: SimulatedSite, x: Tensor) -> Tensor:
        inputs[site.path].append(x.flatten(0, -2))
        return site.output(frozenset(site.causes), x)

    lab.loss({each.node: lambda x, each=each: keep(each, x) for each in sites})
    for site in sites:
        assert isinstance(site, LinearSite)
        assert site.quantizer is not None
        x = torch.cat(inputs[site.path]).double()
        scale = site.quantizer.scale
        assert scale is not None
        limit = 127 * scale.double()
        clipped = x.clamp(-limit, limit)
        rounded = (x / scale.double()).round().clamp(-127, 127) * scale.double()
        weight, coded = site.weight.double(), site.coded_weight.double()
        expected = {
            "weights": x @ (coded - weight).T,
            "clipping": (clipped - x) @ coded.T,
            "rounding": (rounded - clipped) @ coded.T,
        }
        found = figures[site.path]
        for cause in CAUSES:
            energy = float(expected[cause].square().sum())
            assert found.energy[cause] == pytest.approx(energy, rel=1e-3)
        error = rounded @ coded.T - x @ weight.T
        assert found.total == pytest.approx(float(error.square().sum()), rel=1e-3)
        signal = float((x @ weight.T).square().sum())
        assert found.sqnr_db == pytest.approx(
            10 * float(torch.tensor(signal / found.total).log10()), abs=0.01
        )
        outside = float(((x / scale.double()).abs() > 127.5).double().mean())
        assert found.share_clipped == pytest.approx(outside, abs=1e-9)
        flushed = float(((rounded == 0) & (x != 0)).double().mean())
        assert found.share_flushed == pytest.approx(flushed, abs=2 / x.numel())
        assert sum(float(t.sum()) for t in found.tokens) == pytest.approx(found.total, rel=1e-4)
        blamed = sum(float(t.sum()) for t in found.token_blame)
        assert blamed == pytest.approx(sum(found.energy.values()), rel=1e-4)
        both = float(((rounded - x) @ coded.T).square().sum())
        assert found.input == pytest.approx(both, rel=1e-3)
        # The floor is of both: a range that clips may round to less than it.
        assert 0 < found.floor <= found.input
        assert found.range_mismatch == found.input - found.floor


@torch.no_grad()
def test_the_floor_is_below_every_range_that_was_tried() -> None:
    """At a dynamic absmax range the floor is at most the rounding energy: it is a candidate."""
    lab, sites = laboratory("llama", "w8a8-dynamic")
    figures, _ = local_figures(lab, sites)
    assert all(each.floor <= each.energy["rounding"] * 1.001 for each in figures.values())
    # A range 8 times too wide leaves 64 times the floor.
    site = sites[0]
    assert isinstance(site, LinearSite)
    assert site.quantizer is not None
    x = torch.randn(64, site.site.shape[1], generator=torch.Generator().manual_seed(1))
    peak = x.abs().max() * 8 / 127
    wide = replace(site, quantizer=replace(site.quantizer, scale=peak))
    energy = float(wide.errors(x)["rounding"].square().sum())
    assert energy / floor_energy(wide, x) > 40
    # Against a fine search: some 3% for the last step, and 3% (2 / 2048)^0.5 because ranges are
    # compared as if the errors of different columns were uncorrelated.
    coarse = replace(site.quantizer, spec=replace(site.quantizer.spec, grid=integer(4)))
    narrow = replace(site, quantizer=coarse)
    limit = x.abs().max() / 7
    energies = []
    for share in torch.linspace(0.2, 1, 400).tolist():
        tried = replace(coarse, scale=limit * share)
        energies.append(float(((tried(x) - x) @ site.coded_weight.T).square().sum()))
    assert floor_energy(narrow, x) <= 1.06 * min(energies)
    # The site's own range is a candidate, also between the steps of the search.
    for share in torch.rand(20, generator=torch.Generator().manual_seed(2)).tolist():
        own = replace(coarse, scale=limit * (0.4 + 0.6 * share))
        error = float(((own(x) - x) @ site.coded_weight.T).double().square().sum())
        assert floor_energy(replace(site, quantizer=own), x) <= error * (1 + 1e-6)


def test_subsets_come_smallest_first() -> None:
    found = subsets(CAUSES)
    assert len(found) == 8
    assert found[0] == frozenset()
    assert all(not later < earlier for earlier, later in itertools.combinations(found, 2))


def test_a_graph_without_known_sites_is_refused() -> None:
    graph = fxquant.trace(opt())
    with pytest.raises(fxquant.FxquantError, match="quantizes nothing"):
        observed_graph(graph, Scheme.parse("fp"), None, False)
