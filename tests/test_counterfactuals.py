"""explain's other choice "smoothing" at a site is what ``+smooth`` would do there."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

import fxquant
from fxquant.analysis.calibrated import Calibrated, calibration_inputs
from fxquant.analysis.counterfactuals import choices
from fxquant.analysis.inputs import as_batches
from fxquant.analysis.lab import Lab
from fxquant.analysis.local import local_figures
from fxquant.analysis.sites import LinearSite, SimulatedSite, SiteMaker, simulated_sites
from fxquant.ir.graph import linear_parameters
from fxquant.passes.smooth import smoothing_scales
from fxquant.schemes.scheme import Scheme
from tests.architectures import llama, opt, padding_mask, token_ids

BATCHES = [
    {"input_ids": token_ids(2, 9, seed=3), "attention_mask": padding_mask(2, 9, "left")},
    {"input_ids": token_ids(1, 7, seed=4)},
]
SILENT = 3


def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """One channel behind every norm is 0, whatever comes in."""
    for name, module in model.named_modules():
        if "norm" in name:
            for parameter in module.parameters():
                parameter.data[SILENT] = 0
    return model


def seen(
    model: PreTrainedModel, scheme: str
) -> tuple[Lab, tuple[SimulatedSite, ...], dict[str, Calibrated]]:
    observed = fxquant.convert(model, scheme, calibration=BATCHES, level="observed")
    lab, sites = Lab(observed, (token_ids(1, 8),)), simulated_sites(observed, Scheme.parse(scheme))
    batches = as_batches(BATCHES, observed)
    assert batches is not None
    return lab, sites, calibration_inputs(lab, sites, batches)


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-static:absmax"])
@pytest.mark.parametrize("build", [opt, llama])
def test_its_scales_are_the_repairs(build: type[PreTrainedModel], scheme: str) -> None:
    model = silenced(build())
    _, sites, found = seen(model, scheme)
    plain = fxquant.convert(model, "fp")
    compared = 0
    for where in ("default", "all"):
        options = f"smooth(where={where},insert=true)"
        repaired = fxquant.convert(model, f"{scheme}+{options}", calibration=BATCHES, level="float")
        for site in sites:
            fed_by_rows = site.path.endswith(("out_proj", "o_proj", "down_proj", "fc2"))
            if fed_by_rows is (where == "default"):
                continue  # under where=all the rows of v_proj, up_proj and fc1 change too
            before, after = (
                linear_parameters(each.get_submodule(site.path))[0] for each in (plain, repaired)
            )
            scale = found[site.path].smoothing
            assert scale is not None
            assert torch.equal(before * scale, after), site.path
            compared += 1
    assert compared == len(sites) > 10


def test_a_silent_channel_and_siblings_count_as_in_the_repair() -> None:
    model = silenced(llama())
    _, sites, found = seen(model, "w8a8-dynamic")
    q, k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    scale = found[q].smoothing
    assert scale is not None
    assert scale[SILENT] == 1
    for sibling in (k, v):
        other = found[sibling].smoothing
        assert other is not None
        assert torch.equal(scale, other)
    peaks = torch.cat(found[q].rows).abs().amax(0)
    weights = {site.path: site.weight for site in sites if isinstance(site, LinearSite)}
    alone = smoothing_scales(peaks, weights[q].abs().amax(0), 0.5)
    together = torch.stack([weights[path].abs().amax(0) for path in (q, k, v)]).amax(0)
    assert not torch.equal(alone, scale)
    assert torch.equal(smoothing_scales(peaks, together, 0.5), scale)


def test_one_worst_site_is_smoothed_as_among_all() -> None:
    model = silenced(llama())
    lab, sites, found = seen(model, "w8a8-dynamic")
    batches = as_batches(BATCHES, lab.gm)
    assert batches is not None
    chosen = [site for site in sites if site.path.endswith("1.mlp.up_proj")]
    alone = calibration_inputs(lab, chosen, batches)
    assert alone.keys() == {chosen[0].path}
    mine, wanted = (each[chosen[0].path] for each in (alone, found))
    assert mine.smoothing is not None
    assert wanted.smoothing is not None
    assert torch.equal(mine.smoothing, wanted.smoothing)
    assert all(map(torch.equal, mine.rows, wanted.rows))


def test_the_choice_computes_what_the_smoothed_site_would() -> None:
    """Against the converted model with ``+smooth``, on the input that the site sees there."""
    model = silenced(opt())
    scheme = "w8a8-dynamic-token"
    lab, sites, found = seen(model, scheme)
    figures, _ = local_figures(lab, sites)
    (site,) = (s for s in sites if s.path.endswith("layers.1.fc1"))
    functions = dict(choices(site, figures[site.path], SiteMaker(lab.gm), found[site.path]))
    repaired = fxquant.convert(model, f"{scheme}+smooth", calibration=BATCHES, level="float")
    module = repaired.get_submodule(site.path)
    weight, bias = linear_parameters(module)
    x, scale = torch.cat(found[site.path].rows), found[site.path].smoothing
    assert scale is not None
    smoothed = SiteMaker(fxquant.convert(repaired, "fp", pipeline=fxquant.Pipeline(())))
    expected = smoothed.make(site.path, Scheme.parse(scheme).spec)
    assert isinstance(expected, LinearSite)
    assert torch.equal(expected.weight, weight)
    y = expected.output(frozenset(expected.causes), x / scale)
    assert torch.equal(functions["smoothing"](x), y)
    assert bias is not None
