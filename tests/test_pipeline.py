"""Contracts of passes are checked on what they leave; broken promises are found and named."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxquant
from fxquant.errors import VerificationError
from fxquant.ir.builder import Builder
from fxquant.ir.graph import (
    Level,
    PassRecord,
    info,
    set_tag,
    site_outputs,
    source_of,
    tag,
    update_info,
)
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.legal_forms import OPS
from fxquant.passes import Integerize, NameSites, Observe, Quantize
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Effect, Pass, Pipeline
from fxquant.run.probe import Probe, relative_difference
from fxquant.schemes.scheme import Scheme
from tests.architectures import llama, opt, token_ids

FC1 = "model.decoder.layers.1.fc1"


@functools.cache
def graph(scheme: str = "fp", level: str = "float") -> GraphModule:
    """Shared; passes work on copies."""
    return fxquant.convert(opt(), scheme, level=level)


def site_node(gm: GraphModule, path: str) -> Node:
    return next(node for site, node in site_outputs(gm) if site.path == path)


def of_levels(
    *levels: Level, effect: Effect = "lossy", ensures: Level | None = None
) -> Callable[[Callable[[GraphModule], None]], Pass]:
    """Make a pass of what a function does to a graph; it is named like the function."""
    wanted, promised, after = levels, effect, ensures

    def made(change: Callable[[GraphModule], None]) -> Pass:
        @dataclass(frozen=True)
        class Change(Pass):
            name = change.__name__
            requires = wanted
            effect = promised
            ensures = after

            def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
                change(gm)
                return gm

        return Change()

    return made


def wrong_scale_shape(*shape: int) -> Pass:
    """A scale for another number of rows: broadcasting would fail, or worse, not fail."""

    @of_levels(Level.QDQ, Level.INTEGER)
    def wrong_scale_shape(gm: GraphModule) -> None:
        gm.get_submodule(FC1).register_buffer("weight_scale", torch.ones(shape))

    return wrong_scale_shape


def scale_norm(factor: float, effect: Effect) -> Pass:
    """A new norm, ``factor`` times the old one, before fc1 of the last layer."""

    @of_levels(Level.FLOAT, effect=effect)
    def scale_norm(gm: GraphModule) -> None:
        path = "model.decoder.layers.1.final_layer_norm"
        old = gm.get_submodule(path)
        assert isinstance(old, nn.LayerNorm)
        new = nn.LayerNorm(32)
        new.weight = nn.Parameter(old.weight.detach() * factor)
        new.bias = nn.Parameter(old.bias.detach() * factor)
        gm.add_submodule(path, new)

    return scale_norm


@of_levels(Level.QDQ)
def orphan_buffer(gm: GraphModule) -> None:
    """The float weight beside its codes, forgotten."""
    gm.get_submodule(FC1).register_buffer("float_weight", torch.ones(64, 32))


@of_levels(Level.FLOAT)
def orphan_module(gm: GraphModule) -> None:
    """A linear that no node calls any more."""
    gm.add_submodule("model.decoder.spare", nn.Linear(2, 2))


@of_levels(Level.FLOAT)
def out_of_order(gm: GraphModule) -> None:
    """A value is used before it is computed."""
    node = site_node(gm, FC1)
    next(iter(node.users)).append(node)


@of_levels(Level.FLOAT)
def missing_target(gm: GraphModule) -> None:
    """A module that nobody installed."""
    site_node(gm, FC1).target = "model.decoder.layers.1.fc3"


@of_levels(Level.FLOAT)
def codes_at_float(gm: GraphModule) -> None:
    """A quantize node in a graph that claims to be float."""
    node = site_node(gm, FC1)
    builder = Builder(gm, "codes_at_float", FC1)
    with gm.graph.inserting_before(node):
        chosen = builder.call(
            OPS.choose_qparams.default, source_of(node), "tensor", True, -127, 127
        )
        builder.item(chosen, 0, "scale")


@of_levels(Level.QDQ, ensures=Level.INTEGER)
def stays_at_qdq(gm: GraphModule) -> None:
    """Says that it leaves integers, but leaves activations dequantized."""


def other_where_nothing_is_seen(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Kernels differ there: 0, or an average of the values. Here it is 3."""
    out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return torch.where(mask.any(-1, keepdim=True), out, 3.0)


def other_kernel(spoil: float = 0.0) -> Pass:
    """Another attention: queries of padding get 3, the others 1 + ``spoil`` of what they had."""

    @of_levels(Level.FLOAT, effect="equivalent")
    def other_kernel(gm: GraphModule) -> None:
        for node in gm.graph.nodes:
            if node.target is OPS.attention.default:
                node.target = other_where_nothing_is_seen
                with gm.graph.inserting_after(node):
                    spoiled = gm.graph.call_function(operator.mul, (node, 1 + spoil))
                node.replace_all_uses_with(spoiled, lambda user, it=spoiled: user is not it)

    return other_kernel


@of_levels(Level.FLOAT, effect="equivalent")
def drop_bias(gm: GraphModule) -> None:
    """Only the very last layer changes, whose output no site follows."""
    path = "model.decoder.final_layer_norm"
    old = gm.get_submodule(path)
    assert isinstance(old, nn.LayerNorm)
    new = nn.LayerNorm(32, bias=False)
    new.weight = old.weight
    gm.add_submodule(path, new)


@of_levels(Level.FLOAT, Level.QDQ, Level.INTEGER)
def forget_bias(gm: GraphModule) -> None:
    """A site's bias goes without a trace: nothing is left behind that could be found."""
    node = site_node(gm, FC1)
    if node.op == "call_module":
        gm.get_submodule(FC1).bias = None  # type: ignore[assignment]
    elif node.target is nn.functional.linear:
        node.args = (*node.args[:2], None)
    else:
        rescaled = source_of(node)
        set_tag(rescaled, tag(node))
        node.replace_all_uses_with(rescaled)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    if node.op != "call_module":
        del gm.get_submodule(FC1)._buffers["bias"]


@of_levels(Level.FLOAT, effect="exact")
def forget_site(gm: GraphModule) -> None:
    """Loses the tag of a site's output: the site could not be checked or found any more."""
    node = site_node(gm, FC1)
    set_tag(node, type(tag(node))())


@of_levels(Level.FLOAT, Level.QDQ, Level.INTEGER, effect="exact")
def nothing(gm: GraphModule) -> None:
    """Changes nothing, and says so."""


DOUBLED = scale_norm(2.0, "exact")
BROKEN: dict[str, tuple[Pass, str, str]] = {
    "scale of other rows": (wrong_scale_shape(32, 1), "qdq", rf"{FC1}: node \S+: scale of shape"),
    "scale of columns": (wrong_scale_shape(1, 32), "qdq", rf"{FC1}: node \S+: scale of shape"),
    "scale at integer": (wrong_scale_shape(32, 1), "integer", rf"{FC1}"),
    "orphan buffer": (orphan_buffer, "qdq", rf"{FC1}: {FC1}\.float_weight is left behind"),
    "orphan module": (orphan_module, "float", r"model\.decoder\.spare\.weight is left behind"),
    "out of order": (out_of_order, "float", rf"{FC1}: node \S+: uses \S+ before it is computed"),
    "dropped bias at float": (
        forget_bias,
        "float",
        rf"{FC1}: node \S+: the site's bias is dropped",
    ),
    "dropped bias at qdq": (forget_bias, "qdq", rf"{FC1}: node \S+y: the site's bias is dropped"),
    "dropped bias at integer": (
        forget_bias,
        "integer",
        rf"{FC1}: node \S+rescaled: the site's bias is dropped",
    ),
    "missing target": (missing_target, "float", r"not well-formed: .*fc3"),
    "illegal at float": (codes_at_float, "float", rf"{FC1}: node \S+: choose_qparams may not"),
    "illegal at integer": (stays_at_qdq, "qdq", "an activation is still dequantized"),
    "not exact": (scale_norm(1 + 1e-6, "exact"), "float", r"exact \(at most 0\)"),
    "not equivalent": (scale_norm(1.001, "equivalent"), "float", rf"{FC1}.*equivalent \(at most"),
    "not equivalent at the end": (drop_bias, "float", "(lm_head|logits).*equivalent"),
    # No comparison of numbers may let it through.
    "NaN": (scale_norm(float("nan"), "equivalent"), "float", "relative difference inf"),
    "forgotten site": (forget_site, "float", FC1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_passes_are_caught_by_name(what: str) -> None:
    broken, level, message = BROKEN[what]
    scheme = "fp" if level == "float" else "w8a8-dynamic-token"
    with pytest.raises(VerificationError, match=rf"(?s)after {broken.name}: .*{message}"):
        broken(graph(scheme, level))


def test_passes_within_their_tolerance_are_let_through() -> None:
    """A factor of 1.00001 is 1e-5 at the next site: equivalent (1e-4), not exact."""
    result = scale_norm(1 + 1e-5, "equivalent")(graph())
    difference = info(result).history[-1].difference
    assert difference is not None
    assert 1e-6 < difference < 1e-4


@pytest.mark.parametrize(
    ("wrong", "level", "found"),
    [
        (Integerize(), "float", "pass integerize needs level qdq, the graph is at float"),
        (
            Quantize(),
            "integer",
            "pass quantize needs level float or observed, the graph is at integer",
        ),
        (NameSites(), "qdq", "pass name_sites needs level float, the graph is at qdq"),
    ],
)
def test_wrong_input_level(wrong: Pass, level: str, found: str) -> None:
    with pytest.raises(VerificationError, match=found):
        wrong(graph("fp" if level == "float" else "w8a8-dynamic-token", level))


def other_operand(gm: GraphModule) -> None:
    node = site_node(gm, FC1)
    node.args = (source_of(source_of(node)),)


def other_order(gm: GraphModule) -> None:
    """Two nodes change places: no value differs."""
    block = FC1.rpartition(".")[0]
    pair = [site_node(gm, f"{block}.self_attn.{name}_proj") for name in "kv"]
    first, second = sorted(pair, key=list(gm.graph.nodes).index)
    second.append(first)


def other_weight(gm: GraphModule) -> None:
    linear = gm.get_submodule(FC1)
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def written_weight(gm: GraphModule) -> None:
    """In place, where no object says so; back at once, since the model shares it."""
    linear = gm.get_submodule(FC1)
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.mul_(2)
        linear.weight.mul_(0.5)


def another_node(gm: GraphModule) -> None:
    node = site_node(gm, FC1)
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(torch.neg, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def other_data(gm: GraphModule) -> None:
    """The same parameter, never written into, over other memory."""
    linear = gm.get_submodule(FC1)
    assert isinstance(linear, nn.Linear)
    linear.weight.data = linear.weight.data.clone()


def other_setting(gm: GraphModule) -> None:
    norm = next(module for module in gm.modules() if isinstance(module, nn.LayerNorm))
    norm.eps = 0.5


@pytest.mark.parametrize(
    "change",
    [
        *(other_operand, other_order, other_weight, other_data, other_setting, written_weight),
        another_node,
    ],
)
def test_a_pass_that_only_names_may_change_no_node(change: Callable[[GraphModule], None]) -> None:
    """Also where no probe would see it."""
    named = type(of_levels(Level.FLOAT, effect="exact")(change))
    named.only_names = True
    with pytest.raises(VerificationError, match=rf"after {change.__name__}: .* only names nodes"):
        named()(graph())


def test_a_graph_that_a_pass_calls_is_as_the_passes_before_left_it() -> None:
    ids = token_ids(2, 7)
    found: list[Tensor] = []

    @of_levels(Level.FLOAT)
    def call(gm: GraphModule) -> None:
        found.append(gm(ids))

    @of_levels(Level.FLOAT)
    def negate_output(gm: GraphModule) -> None:
        [output] = gm.graph.find_nodes(op="output")
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(torch.neg, (output.args[0],)),)

    after = Pipeline((negate_output, call)).run(graph())
    assert torch.equal(found[0], -graph()(ids))
    assert torch.equal(after(ids), found[0])
    assert "neg" in after.code


def snapshot(gm: GraphModule) -> tuple[object, ...]:
    modules = tuple((name, type(module).__name__) for name, module in gm.named_modules())
    versions = tuple((n, id(t), t._version) for n, t in gm.state_dict(keep_vars=True).items())
    metas = tuple((node.name, tag(node)) for node in gm.graph.nodes)
    return str(gm.graph), info(gm), modules, versions, metas


@pytest.mark.parametrize(
    ("step", "scheme", "level"),
    [
        (NameSites(), "fp", "float"),
        (Observe(), "fp", "float"),
        (Quantize(), "fp", "float"),
        (Integerize(), "w8a8-dynamic-token", "qdq"),
        (scale_norm(1.00001, "equivalent"), "fp", "float"),
        (DOUBLED, "fp", "float"),
    ],
)
def test_a_pass_leaves_its_input(step: Pass, scheme: str, level: str) -> None:
    """Also when it fails."""
    context = Context(
        Scheme.parse("w4-g12-asym/a8-dynamic" if step == Quantize() else "w8a8-static")
    )
    before, ids = graph(scheme, level), token_ids(2, 7)
    was, logits = snapshot(before), before(ids)
    if step is DOUBLED:
        with pytest.raises(VerificationError):
            step(before, context)
    else:
        result = step(before, context)
        assert result is not before
        assert not {id(m) for m in result.modules()} & {id(m) for m in before.modules()}
    assert snapshot(before) == was
    assert torch.equal(before(ids), logits)


def test_history_records_every_pass() -> None:
    facts = info(fxquant.convert(opt(), "w8a8-static", calibration=[token_ids(1, 4)]))
    history = {record.name: record for record in facts.history}
    names = ["name_sites", "observe", "calibrate", "quantize", "integerize"]
    assert [record.name for record in facts.history] == names
    assert all(record.milliseconds >= 0 for record in facts.history)
    assert (history["name_sites"].added, history["name_sites"].difference) == (0, 0.0)
    # Inputs: q/k/v share one, so 4 of 6 linears in each of 2 layers get an observer.
    assert (history["observe"].added, history["observe"].removed) == (8, 0)
    assert history["observe"].difference == 0.0
    assert history["quantize"].difference is None
    assert history["quantize"].sites == 12
    # 8 observers go, 12 linears are replaced.
    assert (history["quantize"].removed, history["quantize"].replaced) == (8, 12)
    assert history["integerize"].replaced == 12
    difference = history["integerize"].difference
    assert difference is not None
    assert 0 < difference < 1e-5
    assert facts.level == Level.INTEGER
    assert facts.scheme == "w8a8-static"


def test_passes_run_in_order_and_the_callback_sees_each() -> None:
    seen: list[tuple[str, Level, int]] = []

    def after(step: Pass, gm: GraphModule) -> None:
        seen.append((step.name, info(gm).level, len(info(gm).history)))
        gm(token_ids(1, 3))  # it runs

    steps = (NameSites(), Quantize(), nothing, Integerize())
    Pipeline(steps, Context(Scheme.parse("w8a8-dynamic")), after).run(fxquant.trace(opt()))
    assert seen == [
        ("name_sites", Level.FLOAT, 1),
        ("quantize", Level.QDQ, 2),
        ("nothing", Level.QDQ, 3),
        ("integerize", Level.INTEGER, 4),
    ]


def test_after_a_failure_no_later_pass_runs() -> None:
    seen: list[str] = []
    steps = (nothing, DOUBLED, nothing)
    with pytest.raises(VerificationError, match="after scale_norm"):
        Pipeline(steps, after_pass=lambda step, _: seen.append(step.name)).run(graph())
    assert seen == ["nothing"]


def test_convert_takes_a_pipeline() -> None:
    steps = Pipeline((NameSites(), nothing, Quantize()), Context(Scheme.parse("w4")))
    gm = fxquant.convert(opt(), "w4", pipeline=steps)
    assert [record.name for record in info(gm).history] == ["name_sites", "nothing", "quantize"]
    assert info(gm).level == Level.QDQ
    assert isinstance(gm.get_submodule(FC1), QuantizedParameters)
    assert torch.equal(gm(token_ids(1, 5)), fxquant.convert(opt(), "w4")(token_ids(1, 5)))


def test_an_empty_pipeline_is_a_pipeline() -> None:
    gm = fxquant.convert(opt(), "w8", pipeline=Pipeline(()))
    assert info(gm).history == ()
    assert not any(isinstance(module, QuantizedParameters) for module in gm.modules())


def test_new_nodes_carry_their_site_and_origin() -> None:
    before = set(fxquant.trace(llama()).graph.nodes)
    gm = fxquant.convert(llama(), "w8a8-dynamic-token")
    names = {node.name for node in before}
    sites = {site.path for site in info(gm).sites}
    new = [node for node in gm.graph.nodes if node.name not in names]
    assert len(new) > 14 * 5
    for node in new:
        assert tag(node).site in sites
        assert tag(node).origin in ("quantize", "integerize")


Pair = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.clone(), 0.0),
        (lambda x: x + 0.5, 0.125),
        (lambda x: x * float("nan"), float("inf")),
        (lambda x: x * float("inf"), float("inf")),
        (lambda x: x[:1], float("inf")),
        (lambda x: x.half(), float("inf")),
    ],
)
def test_relative_difference(change: Pair, expected: float) -> None:
    assert relative_difference(torch.tensor([1.0, -4.0]), change(torch.tensor([1.0, -4.0]))) == (
        expected
    )


def test_records_are_values() -> None:
    assert PassRecord("a", 1, 2, 3, 4.0, None) == PassRecord("a", 1, 2, 3, 4.0, None)
    copy = graph()
    update_info(copy, scheme="fp")
    assert info(copy).scheme == "fp"


def test_what_padding_gives_is_not_compared() -> None:
    changed = Pipeline((other_kernel(),)).run(graph())
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    before, after = (gm(input_ids=ids, attention_mask=mask) for gm in (graph(), changed))
    assert relative_difference(before[0, :4], after[0, :4]) > 0.01, "the kernels differ there"
    assert relative_difference(before[mask.bool()], after[mask.bool()]) < 1e-6


def test_what_attended_positions_give_is_compared() -> None:
    with pytest.raises(VerificationError, match=r"self_attn\.out_proj: relative difference 0\.00"):
        Pipeline((other_kernel(spoil=0.01),)).run(graph())


def test_attended_parts_of_every_layout() -> None:
    probe = Probe.random(50, torch.device("cpu"), batch=3, length=5)
    mask = probe.attention_mask.bool()
    tokens = torch.randn(3, 5, 7)
    wanted = torch.stack([tokens[b, t] for b, t in mask.nonzero().tolist()])
    assert len(wanted) < 15
    assert torch.equal(probe.attended(tokens), wanted)
    assert torch.equal(probe.attended(tokens.flatten(0, 1)), wanted)
    heads = torch.randn(3, 2, 5, 4)
    by_head = torch.stack([heads[b, :, t] for b, t in mask.nonzero().tolist()])
    assert torch.equal(probe.attended(heads), by_head)
    merged = probe.attended(heads.flatten(0, 1))
    assert torch.equal(merged.sort(0).values, by_head.flatten(0, 1).sort(0).values)
    other = torch.randn(7, 11)
    assert torch.equal(probe.attended(other), other)
