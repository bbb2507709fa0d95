"""``convert``: the integer graph, the user's model, calibration, overrides, and bad input."""

from __future__ import annotations

import copy
import functools
import gc
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import CalibrationError, FxquantError, GraphError, NonFiniteError, SchemeError
from fxquant.ir.graph import clone_sharing_storage, info, is_op, tag
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.numerics.gemm import reference_int_gemm
from fxquant.numerics.observers import HistogramObserver
from fxquant.passes import NameSites
from fxquant.passes.integerize import Integerize
from fxquant.run.execution import Executor
from fxquant.run.probe import Probe
from fxquant.schemes.scheme import Scheme
from tests import test_tracing
from tests.architectures import (
    ARCHITECTURES,
    POSITIONS,
    VOCABULARY,
    gpt2,
    llama,
    opt,
    padding_mask,
    token_ids,
)
from tests.test_tracing import state, unchanged

MODELS: dict[str, Callable[..., PreTrainedModel]] = {"opt": opt, "gpt2": gpt2, "llama": llama}

EVERYTHING = (
    '{"scheme": "w8a8-dynamic", "overrides": {"head": "w8/a8-static", "embeddings": "w4-g8"}}'
)
ACTIVATION_SCHEMES = [
    "w8a8-dynamic",
    "w8a8-dynamic-token",
    "w8a8-static",
    "w8a8-static:absmax",
    "w8a8-static:p99.99",
    "w8a8-static:mse",
    "w8a8-static:entropy",
    "w8a8-static-asym",
    "w8a8-static-asym:mse",
    "w8a8-dynamic-asym",
    "w8a8-dynamic-token-asym",
    "w8-asym/a8-dynamic-asym",
    "w8-asym/a8-static-asym:absmax",
    "w8-tensor/a8-static:absmax",
    "w8-tensor-asym/a8-dynamic-token",
    "w4/a8-dynamic-token",
    "w4-tensor-asym/a8-dynamic-token-asym",
    "w4-g12/a8-dynamic-token",
    "w4-g12-asym/a8-static-asym:absmax",
    "w3-g16/a4-dynamic-token",
    "w2/a2-dynamic",
    EVERYTHING,
]
WEIGHT_SCHEMES = [
    "w8",
    "w8-asym",
    "w8-tensor",
    "w4",
    "w4-g12",
    "w4-g12-asym",
    "w3-g16",
    "w2-tensor",
]
# How a static range was found leaves no trace in the graph: one model has all the estimators.
ESTIMATED = [scheme for scheme in ACTIVATION_SCHEMES if re.search(":(mse|entropy|p99)", scheme)]


def cases(schemes: list[str]) -> list[tuple[str, str]]:
    """(model, scheme) pairs."""
    return [(n, s) for n in MODELS for s in schemes if n == "opt" or s not in ESTIMATED]


# One of each kind, for the tests that take longer.
FEW = ["w8", "w4-g12-asym", "w8a8-static-asym:absmax", "w4-g12/a8-dynamic-token", EVERYTHING]


def calibration(count: int = 3, seed: int = 50) -> list[Tensor]:
    return [token_ids(2, 16, seed + index) for index in range(count)]


def traced(name: str) -> GraphModule:
    """Shared by tests that do not change it."""
    return test_tracing.traced(name)[1]


@functools.cache
def converted(name: str, scheme: str, level: str = "integer") -> GraphModule:
    """Shared by tests that do not change it."""
    return fxquant.convert(traced(name), scheme, calibration=calibration(), level=level)


def tensors(gm: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gm.state_dict().items()}


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def site_values(gm: GraphModule, target: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the nodes that call ``target`` compute, by site."""
    found: dict[str, Tensor] = {}

    def keep(node: Node, value: Any) -> Any:
        if is_op(node, target):
            found[tag(node).site or ""] = value
        return value

    Executor(gm).run(keep, **inputs)
    return found


# Levels


@torch.no_grad()
@pytest.mark.parametrize(("name", "scheme"), cases(ACTIVATION_SCHEMES))
def test_integers_compute_what_qdq_computes(name: str, scheme: str) -> None:
    """The step is algebra: given the same codes, only float32 roundings differ.

    Per site two roundings of each of at most 64 products, 2^-24 each and mostly cancelling, then
    some tens of operations to the logits: 3e-6 of the largest one. Affine codes sum up to
    64 * 255 * 255 before their corrections cancel, all in exact int32.
    """
    inputs = {"input_ids": token_ids(3, 17), "attention_mask": padding_mask(3, 17, "left")}
    qdq, integer = (converted(name, scheme, level) for level in ("qdq", "integer"))
    assert any(is_op(n, OPS.dequantize.default) for n in qdq.graph.nodes)
    gemms = (OPS.int_gemm.default, OPS.grouped_gemm.default)
    assert any(is_op(n, op) for n in integer.graph.nodes for op in gemms)
    codes = site_values(qdq, OPS.quantize.default, inputs)

    def given(node: Node, value: Any) -> Any:
        return codes[tag(node).site or ""] if is_op(node, OPS.quantize.default) else value

    expected, found = qdq(**inputs), Executor(integer).run(given, **inputs)
    keep = inputs["attention_mask"].bool()
    assert float((found - expected)[keep].abs().max() / expected[keep].abs().max()) <= 3e-6


@torch.no_grad()
@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_weight_only_is_the_same_at_both_levels(scheme: str) -> None:
    ids = token_ids(2, 9)
    assert torch.equal(converted("opt", scheme, "qdq")(ids), converted("opt", scheme)(ids))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_float_schemes_change_nothing(name: str) -> None:
    ids = token_ids(2, 9)
    expected = traced(name)(ids)
    assert torch.equal(converted(name, "fp")(ids), expected)
    # Conv1D adds the bias inside its GEMM, F.linear may sum in another order.
    torch.testing.assert_close(converted(name, "fp32-gemm")(ids), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_more_bits_are_closer() -> None:
    """The whole ladder in one go; a scheme that quantized nothing would break it."""
    ids = token_ids(4, 16)
    expected = traced("llama")(ids)
    ladder = ["fp", "w8", "w8a8-dynamic-token", "w8a8-dynamic", "w4-g12", "w4", "w2-tensor"]
    errors = [float((converted("llama", scheme)(ids) - expected).norm()) for scheme in ladder]
    assert errors[0] == 0
    assert all(low * 1.1 < high for low, high in itertools.pairwise(errors)), errors


# Which sites, and what is left in float


@pytest.mark.parametrize(("name", "scheme"), cases([*WEIGHT_SCHEMES, *ACTIVATION_SCHEMES]))
def test_every_linear_of_the_blocks_is_quantized(name: str, scheme: str) -> None:
    qmodel = converted(name, scheme)
    facts = info(qmodel)
    linears = [site for site in facts.sites if site.role == "linear"]
    assert len(linears) == {"opt": 12, "gpt2": 8, "llama": 14}[name]
    for site in linears:
        assert isinstance(qmodel.get_submodule(site.path), QuantizedParameters)
    everything = scheme == EVERYTHING
    for path in (facts.head, facts.embeddings):
        module = qmodel.get_submodule(str(path))
        assert isinstance(module, QuantizedParameters) == everything
        reasons = [left.reason for left in facts.left_in_float if left.path == path]
        assert len(reasons) == (0 if everything else 1)
    assert all(left.reason for left in facts.left_in_float)


@torch.no_grad()
def test_globs_leave_sites_in_float() -> None:
    scheme = (
        '{"scheme": "w8", "overrides": {"*.fc2": "fp", "*.layers.1.*proj": "w4", "head": "w4"}}'
    )
    qmodel = fxquant.convert(opt(), scheme)
    layer = "model.decoder.layers"
    for index in (0, 1):
        assert isinstance(qmodel.get_submodule(f"{layer}.{index}.fc1"), QuantizedParameters)
        assert isinstance(qmodel.get_submodule(f"{layer}.{index}.fc2"), nn.Linear)
    # Four-bit codes lie two in a byte.
    assert qmodel.get_submodule(f"{layer}.1.self_attn.q_proj").weight.shape == (32, 16)
    assert qmodel.get_submodule(f"{layer}.0.self_attn.q_proj").weight.shape == (32, 32)
    assert qmodel.get_buffer("lm_head.weight").dtype == torch.uint8
    reasons = {left.path: left.reason for left in info(qmodel).left_in_float}
    assert "override" in reasons[f"{layer}.0.fc2"]
    assert reasons["model.decoder.embed_tokens"].startswith("embeddings: float unless")
    assert not {f"{layer}.0.fc1", "lm_head"} & set(reasons)


@pytest.mark.parametrize(
    ("name", "path"), [("opt", "model.decoder.embed_positions"), ("gpt2", "transformer.wpe")]
)
def test_position_tables_are_listed_as_float(name: str, path: str) -> None:
    reasons = {left.path: left.reason for left in info(converted(name, "w8")).left_in_float}
    assert "look" in reasons[path]


@pytest.mark.parametrize("pattern", ["*.fc3", "model.layers.0.fc1", "haed"])
def test_an_override_that_matches_nothing_is_an_error(pattern: str) -> None:
    """A misspelt override must not quietly quantize what it was meant to spare."""
    scheme = f'{{"scheme": "w8", "overrides": {{"{pattern}": "fp"}}}}'
    with pytest.raises(SchemeError, match=re.escape(pattern)):
        fxquant.convert(opt(), scheme)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_head_and_embeddings(name: str) -> None:
    """Each on its own: quantized to 8 bits it moves the logits a little, and only a little."""
    ids = token_ids(2, 9)
    expected = traced(name)(ids)
    for part in ("head", "embeddings"):
        scheme = f'{{"scheme": "fp", "overrides": {{"{part}": "w8"}}}}'
        moved = float((converted(name, scheme)(ids) - expected).norm() / expected.norm())
        # Rounding of 8 bits leaves a relative error of about 1 / (127 sqrt(12) / 3) = 0.7%.
        assert 1e-4 < moved < 3e-2, part


# Storage


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("opt", "w8a8-static"), ("gpt2", "w4-g12-asym"), ("llama", EVERYTHING)],
)
def test_no_float_copy_of_a_quantized_weight_is_left(name: str, scheme: str) -> None:
    model = MODELS[name]()
    gc.collect()
    before = {id(value) for value in gc.get_objects() if isinstance(value, Tensor)}
    qmodel = fxquant.convert(model, scheme, calibration=calibration())
    gc.collect()
    quantized = {n for n, m in qmodel.named_modules() if isinstance(m, QuantizedParameters)}
    sites = [site for site in info(qmodel).sites if site.path in quantized]
    storages = set()
    for site in sites:
        weight = model.get_submodule(site.path).weight
        assert isinstance(weight, Tensor)
        storages.add(weight.untyped_storage().data_ptr())
    smallest = min(site.shape[0] * site.shape[1] for site in sites)
    kept = {value.data_ptr() for value in model.parameters()}
    kept |= {value.data_ptr() for name, value in qmodel.named_buffers() if name.endswith("_scale")}
    for value in gc.get_objects():
        if isinstance(value, Tensor) and id(value) not in before and value.is_floating_point():
            assert value.untyped_storage().data_ptr() not in storages
            assert value.data_ptr() in kept or value.numel() < smallest, value.shape


@pytest.mark.parametrize("scheme", FEW)
def test_the_model_stays_as_it_was(scheme: str) -> None:
    model = opt().train()
    with unchanged(model):
        qmodel = fxquant.convert(model, scheme, calibration=calibration())
        qmodel.half()
        qmodel.train()
        qmodel.to(torch.float64)
        qmodel.requires_grad_(True)
        with torch.no_grad():
            qmodel(token_ids(1, 4))


def test_a_failed_conversion_leaves_the_model() -> None:
    model = opt().train()
    with unchanged(model), pytest.raises(CalibrationError):
        fxquant.convert(model, "w8a8-static", calibration=[token_ids(1, POSITIONS + 1)])


@torch.no_grad()
@pytest.mark.parametrize("scheme", FEW)
def test_a_state_dict_is_complete(scheme: str) -> None:
    """Loaded into what another model was converted to, it gives the first one's logits."""
    ids = token_ids(3, 17)
    saved = converted("opt", scheme)
    other = fxquant.convert(opt(seed=1), scheme, calibration=calibration(seed=90))
    assert not torch.allclose(other(ids), saved(ids), atol=0.5)
    other.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    assert torch.equal(other(ids), saved(ids))


def test_loading_by_assignment_leaves_the_model() -> None:
    """Without ``assign=True`` it would write into the storage that the two share."""
    model = opt()
    qmodel = fxquant.convert(model, "w8")
    with unchanged(model):
        doubled = {name: 2 * value for name, value in tensors(qmodel).items()}
        qmodel.load_state_dict(doubled, assign=True)


# Dtypes


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("name", MODELS)
def test_casting_keeps_scales_and_codes(name: str, scheme: str, dtype: torch.dtype) -> None:
    """``half()`` after converting: scales stay float32, codes integers, and the model runs."""
    ids = token_ids(3, 17)
    expected, before = converted(name, scheme)(ids), tensors(converted(name, scheme))
    cast = clone_sharing_storage(converted(name, scheme)).to(dtype)
    for name_, value in cast.state_dict().items():
        last = name_.rpartition(".")[2]
        if last in ("weight_scale", "input_scale") or not before[name_].is_floating_point():
            assert value.dtype == before[name_].dtype
            assert torch.equal(value, before[name_])
        else:
            assert value.dtype == dtype
    found = cast(ids)
    assert found.dtype == dtype
    # Some ten roundings of eps / 2 in a row, which add as squares, make about 2 eps. Besides, the
    # activations' codes are rounded anew: at most another draw of the quantization noise.
    unquantized = traced(name)(ids)
    effect = float((expected - unquantized).norm())
    allowed = effect + 4 * torch.finfo(dtype).eps * float(expected.norm())
    assert float((found.float() - expected).norm()) <= allowed


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["fp32-gemm", *FEW])
def test_models_in_half_precision(scheme: str, dtype: torch.dtype) -> None:
    ids = token_ids(3, 17)
    graph = fxquant.trace(llama().to(dtype))
    qmodel = fxquant.convert(graph, scheme, calibration=calibration())
    expected, found = graph(ids), qmodel(ids)
    assert found.dtype == dtype
    for name, value in qmodel.named_buffers():
        if name.endswith("_scale"):
            assert value.dtype == torch.float32
    # What the same scheme costs in float32, and the rounding of the dtype (see above).
    effect = float((converted("llama", scheme)(ids) - traced("llama")(ids)).norm())
    allowed = 1.5 * effect + 4 * torch.finfo(dtype).eps * float(expected.norm())
    assert float((found.float() - expected.float()).norm()) <= allowed


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token", "w8-asym/a8-static-asym:absmax"])
@pytest.mark.parametrize("name", MODELS)
def test_integer_gemms_are_exact_under_autocast(name: str, scheme: str) -> None:
    inputs = {"input_ids": token_ids(3, 17)}
    qmodel = converted(name, scheme)
    checked = 0

    def check(node: Node, value: Any) -> Any:
        nonlocal checked
        if is_op(node, OPS.int_gemm.default):
            expected = reference_int_gemm(*operands[node.args[0]], *operands[node.args[1]])
            assert torch.equal(value.to(torch.int64), expected), tag(node).site
            checked += 1
        if is_op(node, OPS.quantize.default) or node.op == "get_attr":
            operands[node] = (value,)
        return value

    operands: dict[Any, tuple[Tensor]] = {}
    with torch.autocast("cpu", torch.bfloat16):
        Executor(qmodel).run(check, **inputs)
    assert checked == len([site for site in info(qmodel).sites if site.role == "linear"])


@pytest.mark.parametrize("scheme", FEW)
def test_inference_mode(scheme: str) -> None:
    ids = token_ids(2, 9)
    with torch.inference_mode():
        inside = fxquant.convert(opt(), scheme, calibration=calibration())(ids)
        used = converted("opt", scheme)(ids)
    with torch.no_grad():
        assert torch.equal(converted("opt", scheme)(ids), used)
    assert torch.equal(inside.clone(), used)


# Same in, same out


@torch.no_grad()
@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("name", MODELS)
def test_converting_twice_gives_the_same_bits(name: str, scheme: str) -> None:
    again = fxquant.convert(MODELS[name](), scheme, calibration=calibration())
    assert same_tensors(tensors(again), tensors(converted(name, scheme)))
    assert torch.equal(again(token_ids(2, 9)), converted(name, scheme)(token_ids(2, 9)))


@torch.no_grad()
@pytest.mark.parametrize("scheme", FEW)
def test_from_a_traced_graph(scheme: str) -> None:
    graph = fxquant.trace(opt())
    nodes, before, facts = str(graph.graph), tensors(graph), info(graph)
    qmodel = fxquant.convert(graph, scheme, calibration=calibration())
    assert same_tensors(tensors(qmodel), tensors(converted("opt", scheme)))
    assert str(qmodel.graph) == str(converted("opt", scheme).graph)
    assert (str(graph.graph), info(graph)) == (nodes, facts)
    assert same_tensors(tensors(graph), before)
    assert not any(isinstance(m, QuantizedParameters | HistogramObserver) for m in graph.modules())


def test_text_and_scheme_are_the_same() -> None:
    qmodel = fxquant.convert(opt(), Scheme.parse("w4-g12-asym"))
    assert same_tensors(tensors(qmodel), tensors(converted("opt", "w4-g12-asym")))


@torch.no_grad()
@pytest.mark.parametrize(("backend", "dynamic"), [("inductor", False), ("eager", True)])
def test_compiled(backend: str, dynamic: bool) -> None:
    """One graph without breaks.

    Inductor fuses and reorders float32 arithmetic, so a code in twenty thousand may be rounded
    anew (see test_reference.py): far less than a tenth of what quantization itself does.
    """
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    qmodel, graph = fxquant.convert(model, "w8a8-dynamic-token"), fxquant.trace(model)
    compiled = torch.compile(qmodel, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch, length in [(3, 17), (2, 9)] if dynamic else [(3, 17)]:
        ids = token_ids(batch, length)
        effect = float((qmodel(ids) - graph(ids)).norm())
        assert float((compiled(ids) - qmodel(ids)).norm()) <= 0.1 * effect


# Calibration


def scales(gm: GraphModule) -> dict[str, Tensor]:
    return {n: b for n, b in gm.named_buffers() if n.endswith(("input_scale", "input_zero_point"))}


@pytest.mark.parametrize("name", MODELS)
def test_sites_with_one_input_share_an_observer(name: str) -> None:
    observed = converted(name, "w8a8-static", "observed")
    seen = [m for m in observed.modules() if isinstance(m, HistogramObserver)]
    assert len(seen) == 4 * 2  # before q/k/v, the output projection, and both halves of the MLP
    tokens = sum(batch.numel() for batch in calibration())
    assert {int(observer.tokens) for observer in seen} == {tokens}
    assert len(scales(converted(name, "w8a8-static"))) == 4 * 2


def test_the_pipelines_probe_is_not_observed() -> None:
    """Passes are compared on a batch of random tokens: they are no calibration data."""
    observed = fxquant.convert(
        opt(), "w8a8-static", calibration=[token_ids(1, 4)], level="observed"
    )
    widths = {site.path: site.shape[1] for site in info(observed).sites}
    for module in observed.modules():
        if isinstance(module, HistogramObserver):
            assert (int(module.tokens), int(module.counts.sum())) == (4, 4 * widths[module.site])


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_count(name: str, padding: str) -> None:
    """Other tokens under the padding, the same scales; other attended tokens, other scales."""
    mask = padding_mask(3, 16, padding)
    ids, other = token_ids(3, 16, seed=60), token_ids(3, 16, seed=61)
    garbage = torch.where(mask == 1, ids, other)
    assert not torch.equal(garbage, ids)

    def calibrated(tokens: Tensor) -> dict[str, Tensor]:
        batch = {"input_ids": tokens, "attention_mask": mask}
        return scales(fxquant.convert(traced(name), "w8a8-static:absmax", calibration=[batch]))

    first, second, third = calibrated(ids), calibrated(garbage), calibrated(other)
    assert same_tensors(first, second)
    assert not same_tensors(first, third)


def test_calibration_data_decide_the_ranges() -> None:
    """Ranges come from these batches alone: the smallest one gives the smallest range."""
    batch = token_ids(1, 3, seed=70)
    model = opt()
    few = scales(fxquant.convert(model, "w8a8-static:absmax", calibration=[batch]))
    seen: dict[str, float] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[f"{path}.input_scale"] = float(inputs[0].abs().max()) / 127

        return keep

    for name in few:
        path = name.removesuffix(".input_scale")
        model.get_submodule(path).register_forward_pre_hook(hook(path))
    with torch.no_grad():
        model(batch)
    # The eager model's own activations, 2^-24 apart.
    assert {name: float(value) for name, value in few.items()} == pytest.approx(seen, rel=1e-6)


def forms() -> dict[str, Callable[[], Any]]:
    """The same tokens in every form that calibration takes."""
    batches = calibration()

    def generator() -> Iterator[Tensor]:
        yield from batches

    return {
        "list": lambda: batches,
        "tuple": lambda: tuple(batches),
        "generator": generator,
        "dicts": lambda: [{"input_ids": batch} for batch in batches],
        "masks": lambda: [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches],
        "one batch": lambda: [torch.cat(batches)],
        "rows": lambda: [row[None] for batch in batches for row in batch],
        "int32": lambda: [batch.int() for batch in batches],
        "one tensor": lambda: torch.stack(batches),
        "bool mask": lambda: [
            {"input_ids": b, "attention_mask": torch.ones_like(b).bool()} for b in batches
        ],
        "fully masked batch": lambda: [
            *batches,
            {"input_ids": token_ids(2, 5, 99), "attention_mask": torch.zeros(2, 5).long()},
        ],
    }


@pytest.mark.parametrize("form", forms())
def test_forms_of_calibration(form: str) -> None:
    """Histograms add up exactly, so the cut into batches changes nothing but float32 noise."""
    found = scales(
        fxquant.convert(traced("opt"), "w8a8-static-asym:absmax", calibration=forms()[form]())
    )
    expected = scales(converted("opt", "w8a8-static-asym:absmax"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # GEMMs of another height may sum in another order; a zero point may round the other way.
        atol = 1 if value.dtype == torch.int32 else 0
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol)


def test_ragged_batches() -> None:
    batches = [token_ids(1, 3), token_ids(4, 16), token_ids(2, POSITIONS), token_ids(3, 1)]
    observed = fxquant.convert(opt(), "w8a8-static", calibration=iter(batches), level="observed")
    expected = sum(batch.numel() for batch in batches)
    assert {int(m.tokens) for m in observed.modules() if isinstance(m, HistogramObserver)} == {
        expected
    }


def test_calibration_is_read_once_and_lazily() -> None:
    asked: list[int] = []

    def batches() -> Iterator[Tensor]:
        for index in range(4):
            asked.append(index)
            yield token_ids(1, 8, index)

    fxquant.convert(opt(), "w8a8-static", calibration=batches())
    assert asked == [0, 1, 2, 3]


def test_progress_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fxquant.convert(opt(), "w8a8-static", calibration=calibration(), progress=True)
    captured = capsys.readouterr()
    assert "calibrate" not in captured.out + captured.err


def test_progress_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    fxquant.convert(opt(), "w8a8-static", calibration=calibration(), progress=True)
    assert "calibrate: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    shown = terminal.getvalue()
    fxquant.convert(opt(), "w8a8-static", calibration=calibration())
    assert terminal.getvalue() == shown


# Bad input


def used_up() -> Iterator[Tensor]:
    batches = iter(calibration())
    list(batches)
    return batches


def masked() -> list[dict[str, Tensor]]:
    ids = token_ids(2, 8)
    return [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}]


BAD_CALIBRATION: dict[str, tuple[Any, str]] = {
    "none": (None, "scheme w8a8-static has static activation ranges and needs calibration data"),
    "empty list": ([], "calibration is empty"),
    "used up": (used_up(), "calibration is empty.*one-shot iterator used up"),
    "no rows": ([torch.empty(0, 8, dtype=torch.int64)], "hold no token"),
    "no columns": ([torch.empty(2, 0, dtype=torch.int64)], "hold no token"),
    "fully masked": (masked(), "calibration saw no token: .*fully masked"),
    "floats": ([torch.rand(2, 8)], r"batch 0: input_ids must be integers .*torch\.float32"),
    "beyond vocabulary": (
        [token_ids(1, 4), torch.tensor([[3, VOCABULARY]])],
        rf"batch 1: token ids 3..{VOCABULARY} are outside the vocabulary of {VOCABULARY}",
    ),
    "negative": ([torch.tensor([[3, -100]])], "batch 0: token ids -100..3 are outside"),
    "too long": (
        [token_ids(1, POSITIONS + 1)],
        rf"batch 0: rows of {POSITIONS + 1} tokens, but the model has {POSITIONS} positions",
    ),
    "cubes": ([token_ids(4, 4).view(2, 2, 4)], r"batch 0: .*\[batch, length\].*\[2, 2, 4\]"),
    "positions": (
        [{"input_ids": token_ids(1, 4), "position_ids": 1}],
        r"takes no input \['position_ids'\], only input_ids and attention_mask",
    ),
    "mask of another shape": (
        [{"input_ids": token_ids(1, 4), "attention_mask": torch.ones(1, 5)}],
        r"attention_mask \[1, 5\] does not fit input_ids \[1, 4\]",
    ),
    "mask that is a set": (
        [{"input_ids": token_ids(1, 4), "attention_mask": {1}}],
        "batch 0: attention_mask.* got set",
    ),
    "one number": (5, "calibration .*int"),
}


@pytest.mark.parametrize("what", BAD_CALIBRATION)
def test_bad_calibration(what: str) -> None:
    batches, message = BAD_CALIBRATION[what]
    with pytest.raises(CalibrationError, match=message):
        fxquant.convert(opt(), "w8a8-static", calibration=batches)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown level": (
        {"level": "int"},
        "unknown level 'int': known are float, observed, qdq, integer, kernels",
    ),
    "repair": ({"scheme": "w8+smoth"}, r"unknown pass in scheme w8\+smoth: smoth; known: "),
    "repairs": (
        {"scheme": "w8a8-dynamic+smoth(alpha=0.5)+qptg"},
        "unknown pass in scheme .*: smoth, qptg",
    ),
    "option of a repair": ({"scheme": "w8+smooth(beta=1)"}, "smooth has no option beta; its opt"),
    "scheme": ({"scheme": "w8a8-statik"}, r"(?s)w8a8-statik\n.*\^"),
    "json": ({"scheme": '{"scheme": "w8", "overrides": {"head": "w9"}}'}, "bits"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments_fail_before_any_work(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(model: object) -> GraphModule:
        raise AssertionError("traced before the arguments were checked")

    monkeypatch.setattr("fxquant.recipes.conversion.trace", work)
    arguments, message = BAD_ARGUMENTS[what]
    with pytest.raises(SchemeError, match=message):
        fxquant.convert(opt(), **{"scheme": "w8", **arguments})


DOORS: dict[str, Callable[[Any], object]] = {
    "convert": lambda graph: fxquant.convert(graph, "w8"),
    "trace": fxquant.trace,
    "explain": lambda graph: fxquant.explain(graph, "w8", data=token_ids(1, 8)),
    "plan": lambda graph: fxquant.plan(graph, data=token_ids(1, 8), budget=0.1),
    "pipeline": lambda graph: fxquant.recipe("w8").run(graph),
    "pass": lambda graph: NameSites()(graph),
}
LOWERED = {
    "integer": r"quantized already \(scheme w8a8-dynamic, level integer\): start from the model",
    "qdq": r"quantized already \(scheme w8a8-dynamic, level qdq\).*Integerize\(\)\(graph\)",
    "observed": r"has observers already.*Integerize\(\)\)\)\.run",
}


@pytest.mark.parametrize("level", LOWERED)
@pytest.mark.parametrize("door", DOORS)
def test_a_lowered_graph_says_by_which_scheme(door: str, level: str) -> None:
    graph = fxquant.convert(traced("opt"), "w8a8-dynamic", level=level)
    with pytest.raises(FxquantError, match=LOWERED[level]):
        DOORS[door](graph)


def test_a_graph_of_trace_is_not_traced_again() -> None:
    with pytest.raises(GraphError, match=r"graph of fxquant\.trace already: pass it to convert"):
        fxquant.trace(traced("opt"))


@pytest.mark.parametrize(
    "repair", ["smooth", "rotate", "clip", "gptq", "split_outliers(threshold=2.5)", "kv8"]
)
def test_a_graph_that_holds_repairs_is_quantized_as_with_them(repair: str) -> None:
    whole = fxquant.convert(traced("opt"), f"w4/a8-dynamic+{repair}", calibration=[token_ids(2, 9)])
    repaired = fxquant.convert(
        traced("opt"), f"w4/a8-dynamic+{repair}", calibration=[token_ids(2, 9)], level="float"
    )
    later = fxquant.convert(repaired, "w4/a8-dynamic")
    assert torch.equal(later(token_ids(2, 9)), whole(token_ids(2, 9)))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("fp32-gemm", r"compute in fp32 already \(scheme fp32-gemm\): start from the model"),
        ("w8a8-dynamic+attn8", "products are sites of this graph already .*: start from the model"),
    ],
)
def test_a_float_graph_whose_sites_cannot_be_named_again(scheme: str, message: str) -> None:
    level = "integer" if scheme == "fp32-gemm" else "float"
    graph = fxquant.convert(traced("opt"), scheme, level=level)
    for door in ("convert", "pipeline", "explain", "plan"):
        with pytest.raises(GraphError, match=message):
            DOORS[door](graph)


@pytest.mark.parametrize(
    "what", [nn.Linear(2, 2), None, "dir", [1]], ids=lambda w: type(w).__name__
)
def test_what_is_no_graph_is_refused(what: Any, tmp_path: Path) -> None:
    for door in DOORS.values():
        with pytest.raises(FxquantError, match=r"is not a Hugging Face model|not made by fxquant"):
            door(what)
    for taker in (fxquant.inspect, lambda graph: fxquant.save(graph, tmp_path / "new")):
        with pytest.raises(GraphError, match=r"not made by fxquant\.trace"):
            taker(what)
        with pytest.raises(GraphError, match=r"is a model.*fxquant\.convert\(model, scheme\)"):
            taker(opt())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("door", [d for d in DOORS if d != "trace"])
def test_a_foreign_graph_is_refused(door: str) -> None:
    foreign = torch.fx.symbolic_trace(nn.Linear(2, 2))
    with pytest.raises(GraphError, match=r"not made by fxquant\.trace"):
        DOORS[door](foreign)


def rare_overflow() -> tuple[PreTrainedModel, int]:
    """float16, and one token whose embedding plus position overflows; no probe holds it."""
    model = opt(tie_word_embeddings=False).half()
    probes = [
        Probe.random(VOCABULARY, torch.device("cpu"), *shape).input_ids
        for shape in ((3, 13), (2, 12))
    ]
    used = {int(token) for probe in probes for token in probe.reshape(-1)}
    token = next(token for token in range(1, VOCABULARY) if token not in used)
    model.get_parameter("model.decoder.embed_tokens.weight").data[token] = 65504
    model.get_parameter("model.decoder.embed_positions.weight").data.fill_(50)
    return model, token


def test_infinite_activations_name_the_site() -> None:
    model, token = rare_overflow()
    fine = token_ids(1, 8).masked_fill(token_ids(1, 8) == token, 3)
    bad = fine.clone()
    bad[0, 5] = token
    message = r"model\.decoder\.layers\.0\.self_attn\.q_proj: its input holds NaN or infinite"
    with unchanged(model), pytest.raises(NonFiniteError, match=message):
        fxquant.convert(model, "w8a8-static", calibration=[fine, bad])
    # The very token is the cause: without it the same model calibrates.
    fxquant.convert(model, "w8a8-static", calibration=[fine])


# Integerize


def test_exact_gemms_are_certified_per_site() -> None:
    """Short rows are certified: one GEMM. Rows too long for that are cut into chunks of 1024."""
    wide = opt(ffn_dim=2048, num_hidden_layers=1)
    wide.get_parameter("model.decoder.layers.0.fc2.weight").data.fill_(0.01)  # all codes 127
    qmodel = fxquant.convert(wide, "w8a8-dynamic-token")
    chunks = {
        str(tag(n).site).rpartition(".")[2]: n.args[2]
        for n in qmodel.graph.nodes
        if is_op(n, OPS.int_gemm.default)
    }
    assert chunks["fc1"] == 0
    assert chunks["fc2"] == 1024
    assert Integerize.effect == "equivalent"


def test_state_sees_a_change() -> None:
    """The helper that most tests here rely on: it must notice what they look for."""
    changes: list[Callable[[PreTrainedModel], object]] = [
        lambda m: m.train(),
        lambda m: m.half(),
        lambda m: m.requires_grad_(False),
        lambda m: m.get_parameter("lm_head.weight").data.add_(1),
        lambda m: m.lm_head.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.config, "use_cache", not m.config.use_cache),
        lambda m: m.set_attn_implementation("eager"),
    ]
    for change in changes:
        model = opt()
        before = state(model)
        change(model)
        after = state(model)
        different = [k for k in before if k not in ("bytes", "random") and before[k] != after[k]]
        same_bytes = same_tensors(before["bytes"], after["bytes"])
        assert different or not same_bytes


def test_convert_under_the_users_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = fxquant.convert(ARCHITECTURES["llama"](), "w8a8-dynamic-token")
    outside = fxquant.convert(ARCHITECTURES["llama"](), "w8a8-dynamic-token")
    for name, value in outside.state_dict().items():
        assert torch.equal(value, inside.state_dict()[name]), name


def test_integerize_allows_for_the_float_side_under_reduced_precision_settings() -> None:
    strict = Integerize().tolerance(torch.float32)
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        # Operands of the float side round to bf16, by 2**-8 of their size.
        assert Integerize().tolerance(torch.float32) >= 2**-8
        fxquant.convert(ARCHITECTURES["llama"](), "w8a8-dynamic-token")
    finally:
        matmul.fp32_precision = before
    assert Integerize().tolerance(torch.float32) == strict


@pytest.mark.parametrize(
    "scheme", ["fp", "fp32-gemm", "w8a8-static+smooth+correct_bias", "w8a8-static+attn8+kv8"]
)
def test_a_recipe_that_stops_and_one_that_starts_there_are_the_whole(scheme: str) -> None:
    data = [token_ids(1, 5)]
    whole = fxquant.recipe(scheme, calibration=data).passes
    for level in ("observed", "qdq", "integer"):
        first = fxquant.recipe(scheme, calibration=data, level=level).passes
        then = fxquant.recipe(scheme, calibration=data, start=level).passes
        assert first + then == whole
    assert fxquant.recipe(scheme, calibration=data, start="float").passes == whole


def test_a_calibrated_graph_goes_on_without_calibration_data() -> None:
    scheme, data = "w8a8-static+correct_bias", [token_ids(2, 9)]
    observed = fxquant.convert(opt(), scheme, calibration=data, level="observed")
    resumed = fxquant.recipe(scheme, start="observed").run(observed)
    whole = fxquant.convert(opt(), scheme, calibration=data)
    assert torch.equal(resumed(token_ids(1, 6)), whole(token_ids(1, 6)))
    names = [[record.name for record in info(gm).history] for gm in (resumed, whole)]
    assert names[0] == names[1]
    with pytest.raises(SchemeError, match="no pass leads from level qdq back to level observed"):
        fxquant.recipe(scheme, start="qdq", level="observed")
    with pytest.raises(SchemeError, match="unknown level 'middle'"):
        fxquant.recipe(scheme, start="middle")
