"""gptq and refine over a model: better codes, the same float function, resumed where it stopped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import (
    CacheWarning,
    CalibrationError,
    NoEffectError,
    NonFiniteError,
    SchemeError,
)
from fxquant.evaluation.data import cut_windows, load_text
from fxquant.ir.graph import info, site_outputs, source_of
from fxquant.ir.leaves import CodedLinear
from fxquant.numerics.weight_codes import stacked
from fxquant.passes import Gptq, NameSites, Refine
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pipeline
from fxquant.run.gram import Gram
from fxquant.run.sequential import SequentialRun
from fxquant.schemes.scheme import Scheme
from tests.architectures import ARCHITECTURES, llama, opt, padding_mask, token_ids
from tests.models import small_opt


@functools.cache
def trained() -> tuple[PreTrainedModel, Tensor, Tensor]:
    """The small OPT with windows to evaluate and to calibrate on."""
    model, tokenizer = small_opt()
    windows = cut_windows(
        load_text("builtin"), tokenizer, count=12, length=128, calibration=16, seed=0
    )
    return model, windows.evaluation, windows.calibration


@functools.cache
def log_probabilities(scheme: str) -> Tensor:
    model, evaluation, calibration = trained()
    graph = fxquant.convert(model, scheme, calibration=list(calibration.split(4)))
    with torch.no_grad():
        return torch.log_softmax(graph(input_ids=evaluation), -1)


def divergence(scheme: str) -> float:
    """Mean KL divergence from the float model's predictions: finer than a difference of losses."""
    p, q = log_probabilities("fp"), log_probabilities(scheme)
    return float((p.exp() * (p - q)).sum(-1).mean())


def batches() -> list[Any]:
    padded = {"input_ids": token_ids(4, 20), "attention_mask": padding_mask(4, 20, "left")}
    return [token_ids(4, 30, seed=2), padded]


@pytest.mark.parametrize("scheme", ["w3", "w3-g32-asym", "w2-g16-asym"])
def test_closer_to_the_float_model_on_held_out_text(scheme: str) -> None:
    plain = divergence(scheme)
    found, refined = divergence(f"{scheme}+gptq"), divergence(f"{scheme}+gptq+refine")
    assert found < 0.7 * plain
    assert refined < found
    assert divergence(f"{scheme}+refine") < 0.7 * plain


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_float_function_stays_on_every_architecture(name: str) -> None:
    """Every linear of the blocks gets codes; the logits differ by the order of sums."""
    model = ARCHITECTURES[name]()
    scheme = "w4-g16-asym+gptq"
    before = fxquant.convert(model, "fp")
    after = fxquant.convert(model, scheme, calibration=batches(), level="float")
    linears = [site.path for site in info(after).sites if site.role == "linear"]
    assert linears
    for path in linears:
        module = after.get_submodule(path)
        assert isinstance(module, CodedLinear), path
    notes = {note.site for note in info(after).notes if note.origin == "gptq"}
    assert notes == set(linears)
    ids = token_ids(2, 11)
    expected = before(input_ids=ids)
    assert (after(input_ids=ids) - expected).abs().max() <= 1e-4 * expected.abs().max()
    lowered = fxquant.convert(model, scheme, calibration=batches())
    for path in linears:
        chosen = after.get_submodule(path).codes
        assert torch.equal(lowered.get_submodule(path).weight, chosen.weight)  # type: ignore[arg-type,union-attr]


def test_hessians_are_of_what_quantized_earlier_layers_produce() -> None:
    """Each site's Hessian, by hand, from runs of a model whose earlier sites hold the codes."""
    model, scheme = llama(), Scheme.parse("w3")
    seen: dict[str, Tensor] = {}

    class Watching(Gptq):
        def solve(self, weight: Tensor, hessian: Tensor, layers: Any) -> Any:
            seen.update({layer.path: hessian for layer in layers})
            return super().solve(weight, hessian, layers)

    data = batches()
    coded = Pipeline((NameSites(), Watching()), Context(scheme, data)).run(fxquant.trace(model))
    plain = NameSites()(fxquant.trace(model))
    sites = list(site_outputs(coded))
    assert seen.keys() == {site.path for site, _ in sites if site.role == "linear"}
    for (site, node), (_, twin) in zip(sites, list(site_outputs(plain)), strict=True):
        if site.role != "linear":
            continue
        run = SequentialRun(plain, data, label="test")
        hessian = Gram(source_of(twin), site.path)
        run.visit(twin, hessian)
        x = hessian.mean()
        assert torch.allclose(seen[site.path], x, rtol=1e-3, atol=1e-4 * float(x.max())), site.path
        # From here on this site is quantized, unless a later one reads the same input.
        later = [n for s, n in sites if s.role == "linear" and source_of(n) is source_of(node)]
        if later[-1] is node:
            for other in (n for n in later):
                _install_dequantized(plain, coded, str(other.target))


def _install_dequantized(plain: GraphModule, coded: GraphModule, path: str) -> None:
    module = coded.get_submodule(path)
    assert isinstance(module, CodedLinear)
    from fxquant.formats.packing import unpack_int4

    codes = unpack_int4(module.codes.weight, module.weight.shape[1])  # type: ignore[arg-type]
    layer = plain.get_submodule(path)
    layer.weight = torch.nn.Parameter(codes * module.codes.weight_scale, requires_grad=False)  # type: ignore[operator]


@torch.no_grad()
def test_a_hessian_is_the_mean_over_attended_rows() -> None:
    node = next(iter(fxquant.trace(opt()).graph.nodes))
    hessian = Gram(node, "site")
    x = torch.randn(3, 7, 800, generator=torch.Generator().manual_seed(0))
    mask = padding_mask(3, 7, "left")
    hessian(node, x, mask)
    hessian(node, 2 * x[:1], torch.ones(1, 7))
    rows = torch.cat([x[mask.bool()], 2 * x[0]]).double()
    assert torch.allclose(hessian.mean().double(), rows.T @ rows / len(rows), atol=1e-5)
    with pytest.raises(CalibrationError, match="site: calibration saw no token"):
        Gram(node, "site").mean()
    bad = Gram(node, "site")
    bad.add(torch.full((2, 3), torch.inf))
    with pytest.raises(NonFiniteError, match="site: its input holds NaN"):
        bad.mean()
    dead = Gram(node, "site")
    dead.add(torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="site: all its calibration inputs are 0"):
        dead.mean()


def codes_of(graph: GraphModule) -> dict[str, Tensor]:
    return {name: value for name, value in graph.named_buffers() if name.endswith("weight")}


def test_within_and_order_matter_and_refine_keeps_the_grid() -> None:
    def convert(scheme: str) -> dict[str, Tensor]:
        graph = fxquant.convert(llama(), scheme, calibration=batches(), level="integer")
        return dict(graph.named_buffers())

    plain = convert("w3+gptq")
    for other in ("w3+gptq(within=block)", "w3+gptq(order=static)", "w3+gptq(damping=0.1)"):
        found = convert(other)
        assert found.keys() == plain.keys()
        assert any(not torch.equal(found[k], plain[k]) for k in plain if k.endswith("weight"))
    refined = convert("w3+gptq+refine(steps=2)")
    for name, value in plain.items():
        if name.endswith("weight_scale"):
            assert torch.equal(refined[name], value), name
    changed = [n for n in plain if n.endswith("weight") and not torch.equal(refined[n], plain[n])]
    assert changed


def test_the_head_gets_codes_where_the_scheme_names_it() -> None:
    scheme = '{"scheme": "w4+gptq", "overrides": {"head": "w8", "*.fc1": "fp"}}'
    graph = fxquant.convert(opt(), scheme, calibration=batches(), level="float")
    coded = {name for name, m in graph.named_modules() if isinstance(m, CodedLinear)}
    assert "lm_head" in coded
    assert not any(name.endswith("fc1") for name in coded)
    assert len(coded) == 2 * 5 + 1
    fxquant.convert(opt(), scheme, calibration=batches())


def test_an_interrupted_run_resumes_block_by_block(tmp_path: Path) -> None:
    solved: list[str] = []

    class Failing(Gptq):
        def solve(self, weight: Tensor, hessian: Tensor, layers: Any) -> Any:
            if layers[0].path.startswith(stop):
                raise KeyboardInterrupt
            solved.append(layers[0].path)
            return super().solve(weight, hessian, layers)

    def run(cache: Path | None) -> GraphModule:
        context = Context(Scheme.parse("w4-asym"), batches(), cache=cache)
        return Pipeline((NameSites(), Failing()), context).run(fxquant.trace(llama()))

    stop = "model.layers.1.mlp"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    first = list(solved)
    assert any(path.startswith("model.layers.0") for path in first)
    solved.clear()
    stop = "nowhere"
    resumed = run(tmp_path)
    assert solved
    assert all(path.startswith("model.layers.1") for path in solved)
    whole = run(None)
    for name, value in codes_of(whole).items():
        assert torch.equal(codes_of(resumed)[name], value)
    assert info(resumed).notes == info(whole).notes
    solved.clear()
    run(tmp_path)
    assert not solved
    # Another option, other data or other weights are another run.
    assert len(list(tmp_path.iterdir())) == 1
    other = Context(Scheme.parse("w4"), batches(), cache=tmp_path)
    Pipeline((NameSites(), Gptq()), other).run(fxquant.trace(llama()))
    assert len(list(tmp_path.iterdir())) == 2
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.warns(CacheWarning, match=r"layers.0.safetensors is damaged .*computed again"):
        again = run(tmp_path)
    for name, value in codes_of(whole).items():
        assert torch.equal(codes_of(again)[name], value)


def test_convert_keeps_finished_blocks_where_it_is_told(tmp_path: Path) -> None:
    def run(scheme: str) -> GraphModule:
        return fxquant.convert(llama(), scheme, calibration=batches(), cache=tmp_path)

    first = run("w4+gptq+refine")
    assert len(list(tmp_path.iterdir())) == 2  # a run each
    again = run("w4+gptq+refine")
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.warns(CacheWarning, match="damaged"):  # so it was read
        run("w4+gptq+refine")
    with pytest.raises(SchemeError, match=r"nothing in scheme .*clip keeps finished blocks"):
        run("w4+clip")


def test_bad_options_and_missing_calibration_say_so() -> None:
    model = opt()
    with pytest.raises(CalibrationError, match="gptq needs calibration"):
        fxquant.convert(model, "w4+gptq")
    for scheme, said in [
        ("w4+gptq(order=act)", "order must be none or static, got 'act'"),
        ("w4+gptq(damping=2)", "damping"),
        ("w4+gptq(within=row)", "within"),
        ("w4+refine(steps=0)", "steps"),
        ("w4+gptq(cache=x)", "no option cache"),
        ("fp+gptq", "quantizes no linear's weight"),
    ]:
        with pytest.raises(SchemeError, match=said):
            fxquant.convert(model, scheme, calibration=batches())


def test_later_layers_see_dynamically_quantized_activations() -> None:
    plain, quantized = (
        codes_of(fxquant.convert(llama(), scheme, calibration=batches(), level="float"))
        for scheme in ("w4+gptq", "w4a4-dynamic-token+gptq")
    )
    first, behind = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    for name, value in plain.items():
        if name.startswith(first):  # nothing in front of it is quantized
            assert torch.equal(quantized[name], value)
    changed = {
        name: float((quantized[name] != value).float().mean())
        for name, value in plain.items()
        if name.startswith(behind)
    }
    assert max(changed.values()) > 0.01


def test_a_layer_without_output_keeps_its_zeros() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    graph = fxquant.convert(model, "w4+gptq+refine", calibration=batches(), level="float")
    coded = graph.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(coded, CodedLinear)
    assert not coded.codes.get_buffer("weight").any()
    notes = [note.text for note in info(graph).notes if note.site.endswith("0.self_attn.o_proj")]
    assert notes
    assert all("no output on calibration inputs" in note for note in notes)


def test_a_repair_without_effect_fails() -> None:
    class Idle(Refine):
        def solve(self, weight: Tensor, hessian: Tensor, layers: Any) -> Any:
            return stacked(tuple(layer.before for layer in layers))

    context = Context(Scheme.parse("w8"), batches())
    with pytest.raises(NoEffectError, match=r"refine had no effect: .*no code differs"):
        Pipeline((NameSites(), Idle()), context).run(fxquant.trace(opt()))


def test_half_precision_models_keep_their_dtype() -> None:
    model = llama().to(torch.bfloat16)
    graph = fxquant.convert(model, "w4+gptq", calibration=batches())
    assert graph(input_ids=token_ids(1, 5)).dtype == torch.bfloat16
