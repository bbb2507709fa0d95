"""What the printouts say is what the graphs are; goldens hold how they say it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.analysis.inspection.inspection import Inspection
from fxquant.analysis.inspection.shapes import propagate
from fxquant.errors import InspectionError
from fxquant.ir.graph import Level, SiteRecord, add_note, info
from fxquant.ir.leaves import QuantizedParameters
from fxquant.ir.records import NodeText
from fxquant.ir.snapshot import describe
from fxquant.passes import Calibrate, Integerize, NameSites, Observe, Quantize
from fxquant.pipeline.context import Context
from fxquant.pipeline.pipeline import Pass, Pipeline
from fxquant.run.execution import Executor
from fxquant.schemes.scheme import Scheme
from tests.architectures import ARCHITECTURES, llama, opt, token_ids
from tests.conftest import CLOCKS, GOLDEN, Golden, check_goldens
from tests.environments import prints_hf_graph
from tests.masking import masked
from tests.reference import sqnr_db

CALIBRATION = [token_ids(2, 9, seed=seed) for seed in range(3)]
BUILD = {
    "opt": functools.partial(opt, num_hidden_layers=1),
    "llama": functools.partial(llama, num_hidden_layers=1),
}
FC1 = "model.decoder.layers.1.fc1"


@functools.cache
def converted(kind: str, scheme: str) -> GraphModule:
    return fxquant.convert(BUILD[kind](), scheme, calibration=CALIBRATION)


@functools.cache
def two_layers(scheme: str = "w8a8-static") -> Inspection:
    return fxquant.inspect(fxquant.convert(opt(), scheme, calibration=CALIBRATION))


PASSES = ("name_sites", "observe", "calibrate", "quantize", "integerize")


@prints_hf_graph
@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", PASSES)
def test_what_each_pass_changes(name: str, kind: str, golden: Golden) -> None:
    assert fxquant.inspect(converted(kind, "w8a8-static")).diff(name) == golden


REPAIRED = {
    "smooth": "w8a8-static+smooth",
    "awq": "w4-g8-asym+awq",
    "equalize": "w4-tensor+equalize",
    "clip": "w3+clip",
    "gptq": "w4-g8+gptq",
    "refine": "w4-g8+gptq+refine",
    "fold_norms": "w4+rotate",
    "rotate": "w4+rotate",
    "rotate_inputs": "w4+rotate",
    "split_outliers": "w8a8-static+split_outliers(threshold=2.5)",
    "correct_bias": "w3+correct_bias",
    "decompose_attention": "w8a8-static+attn8",
    "attn8": "w8a8-static+attn8",
    "kv4": "w8+kv4",
}


@prints_hf_graph
@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", REPAIRED)
def test_what_each_repair_changes(name: str, kind: str, golden: Golden) -> None:
    assert fxquant.inspect(converted(kind, REPAIRED[name])).diff(name) == golden


def test_the_class_of_a_layer_is_part_of_its_past() -> None:
    found = fxquant.inspect(converted("opt", "w4/a8-static+clip"))
    assert "CodedLinear" not in found.diff("name_sites")
    assert "CodedLinear" in found.diff("clip")
    assert "CodedLinear" in found.diff("quantize")


@prints_hf_graph
def test_what_fp32_gemm_changes(golden: Golden) -> None:
    assert fxquant.inspect(converted("opt", "fp32-gemm")).diff("fp32_gemm") == golden


@prints_hf_graph
@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("scheme", ["w8a8-static", "w4-g8-asym/a8-dynamic-asym", "w8"])
def test_a_layer(scheme: str, kind: str, golden: Golden) -> None:
    assert fxquant.inspect(converted(kind, scheme)).layer(0) == golden


@prints_hf_graph
def test_a_whole_graph(golden: Golden) -> None:
    assert fxquant.inspect(converted("opt", "w8a8-static")).graph() == golden


@pytest.mark.parametrize("clock", CLOCKS)
def test_no_golden_depends_on_the_machines_speed(
    clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", CLOCKS[clock])
    found = fxquant.inspect(fxquant.convert(opt(), "w4", calibration=CALIBRATION))
    ours = (masked(found.summary(markdown=True, fold=False)), masked(found.summary()))
    monkeypatch.undo()
    theirs = two_layers("w4")
    assert ours == (masked(theirs.summary(markdown=True, fold=False)), masked(theirs.summary()))


@prints_hf_graph
@pytest.mark.parametrize("kind", BUILD)
def test_the_summary(kind: str, golden: Golden) -> None:
    assert masked(str(fxquant.inspect(converted(kind, "w8a8-static")))) == golden


def test_the_summary_in_markdown(golden: Golden) -> None:
    assert masked(two_layers("w4").summary(markdown=True, fold=False)) == golden


def test_a_site(golden: Golden) -> None:
    page = fxquant.inspect(converted("opt", "w8a8-static")).site("fc1")
    assert masked(page.partition("input in calibration")[0]) == golden


def test_no_golden_is_stale(request: pytest.FixtureRequest) -> None:
    check_goldens(request.node.getparent(pytest.Module))
    assert [folder.name for folder in GOLDEN.iterdir()] == ["test_inspection"]


def test_goldens_fit_a_line() -> None:
    for path in GOLDEN.rglob("*.txt"):
        if "markdown" not in path.name:
            assert max(map(len, path.read_text().splitlines())) <= 100, path.name


def test_the_summary_fits_a_line_where_its_cells_are_long() -> None:
    mixed = (
        '{"scheme": "w4-g8-asym/a8-static-asym", "overrides": {"*.1.fc2": "w8a8-dynamic-token"}}'
    )
    for fold in (True, False):
        text = two_layers(mixed).summary(fold=fold)
        assert max(map(len, text.splitlines())) <= 100
        # No number is cut: each range, scale and shape stands in one line as Markdown has it.
        cells = two_layers(mixed).summary(fold=fold, markdown=True).partition("SQNR")[2].split("|")
        numbers = {c.strip().partition(" ")[0] for c in cells if re.match(r" *[-±\d]+[\d.]", c)}
        assert numbers
        assert all(number in text for number in numbers)


def test_a_grouped_and_a_token_wise_site(golden: Golden) -> None:
    page = fxquant.inspect(converted("opt", "w4-g8-asym/a8-dynamic-token")).site("fc1")
    assert masked(page.partition("codes of the weight")[0]) == golden


def test_the_summary_with_a_repairs_notes(golden: Golden) -> None:
    assert masked(str(two_layers("w8a8-dynamic+smooth"))) == golden


def test_a_site_without_bias_ends_in_y() -> None:
    gm = converted("llama", "w8a8-static")
    outputs = [node.name for node in describe(gm) if node.tag.is_output and node.tag.site]
    assert sum(name.endswith("_proj_y") for name in outputs) == 7
    assert "rescaled" not in fxquant.inspect(gm).layer(0)


def test_a_layer_of_full_width_fits_a_screen() -> None:
    """OPT-1.3B's names, heads and widths; the feed-forward layer alone is narrower."""
    model = opt(
        num_hidden_layers=1,
        hidden_size=2048,
        word_embed_proj_dim=2048,
        num_attention_heads=32,
        ffn_dim=1024,
    )
    lines = fxquant.inspect(fxquant.convert(model, "w8a8-static", calibration=CALIBRATION[:1]))
    listing = lines.layer(0).splitlines()
    assert max(map(len, listing)) <= 100
    assert len(listing) <= 50
    text = "\n".join(listing)
    assert "[B, 32, L, 64]" in text
    for dtypes in ("int8", "int32", "fp32"):
        assert text.count(f" {dtypes} ") >= 6


def test_two_runs_print_the_same() -> None:
    texts = []
    for _ in range(2):
        gm = fxquant.convert(opt(), "w8a8-static", calibration=CALIBRATION)
        found = fxquant.inspect(gm)
        diffs = [found.diff(name) for name in PASSES]
        page = found.site(FC1)
        texts.append((found.graph(), diffs, page, found.dot(1), masked(str(found))))
    assert texts[0] == texts[1]
    assert "0x" not in str(texts[0])


def evaluated(shape: str, batch: int, length: int) -> tuple[int, ...]:
    """The sizes that ``[B, 2*L, B*L+1]`` stands for."""
    return tuple(
        eval(size, {"B": batch, "L": length})  # texts of our own making
        for size in filter(None, shape.strip("[]").split(", "))
    )


@torch.no_grad()
def check_shapes(gm: GraphModule) -> None:
    """Shapes and dtypes against a real run of another batch and length."""
    found, batch, length = propagate(gm), 3, 9
    ids = token_ids(batch, length)
    seen = []

    def compare(node: torch.fx.Node, value: object) -> object:
        if isinstance(value, Tensor):
            said = found[node.name]
            assert evaluated(said.shape, batch, length) == tuple(value.shape), node.name
            full = {"fp32": "float32"}.get(said.dtype, said.dtype)
            assert f"torch.{full}" == str(value.dtype)
            seen.append(node)
        elif isinstance(value, int) and not isinstance(value, bool):
            text = found[node.name].scalar
            assert text is not None
            assert evaluated(text, batch, length) == (value,)
        return value

    Executor(gm).run(compare, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert len(seen) > 50


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_are_those_of_a_run(name: str) -> None:
    gm = fxquant.trace(ARCHITECTURES[name]())
    check_shapes(gm)
    for index in range(2):
        listing = fxquant.inspect(gm).layer(index)
        assert "?" not in listing
        assert max(map(len, listing.splitlines())) <= 100


@pytest.mark.parametrize(
    "scheme", ["w8a8-static-asym", "w4-g8-asym/a8-dynamic-asym", "w8a8-dynamic-token"]
)
def test_shapes_of_quantized_graphs(scheme: str) -> None:
    check_shapes(fxquant.convert(llama(), scheme, calibration=CALIBRATION))


def test_lengths_stay_below_the_models_positions() -> None:
    gm = fxquant.trace(opt(max_position_embeddings=5))
    assert "[B, L, 32]" in fxquant.inspect(gm).layer(0)


@dataclass(frozen=True)
class Reorder(Pass):
    """Moves a node that nothing hinders, adds none."""

    name = "reorder"
    requires = (Level.FLOAT, Level.QDQ, Level.INTEGER)
    effect = "exact"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        codes = [n for n in gm.graph.nodes if n.op == "get_attr"]
        first = next(n for n in gm.graph.nodes if n.op == "call_module")
        first.prepend(codes[-1])
        return gm


@pytest.mark.parametrize("scheme", ["w8a8-static-asym", "w4-g8-asym/a8-dynamic-asym"])
def test_history_goes_back_to_every_state(scheme: str) -> None:
    """The lists of nodes that undoing gives are those that stood there."""
    kind, seen = Scheme.parse(scheme), [describe(fxquant.trace(llama()))]
    steps = (NameSites(), Observe(), Calibrate(), Quantize(), Reorder(), Integerize())
    context = Context(kind, CALIBRATION)
    pipeline = Pipeline(steps, context, lambda _, gm: seen.append(describe(gm)))
    gm = pipeline.run(fxquant.trace(llama()))
    assert list(fxquant.inspect(gm)._history.states) == seen


def test_history_goes_on_where_a_graph_is_lowered_further() -> None:
    observed = fxquant.convert(opt(), "w8a8-static", calibration=CALIBRATION, level="observed")
    gm = fxquant.recipe("w8a8-static", start="observed").run(observed)
    assert fxquant.inspect(gm).diff("observe") == two_layers().diff("observe")
    assert fxquant.inspect(gm).diff("integerize") == two_layers().diff("integerize")


def test_blocks_that_changed_alike_are_shown_once() -> None:
    text = two_layers().diff("integerize")
    assert "# model.decoder.layers.0 (and alike: model.decoder.layers.1)" in text
    assert text.count("int_gemm") == 6
    mixed = '{"scheme": "w8a8-static", "overrides": {"*.1.fc2": "w8"}}'
    text = two_layers(mixed).diff("integerize")
    assert "alike" not in text
    assert text.count("int_gemm") == 11


@dataclass(frozen=True)
class NewNorm(Pass):
    """The same node, other parameters."""

    name = "new_norm"
    requires = (Level.FLOAT,)
    effect = "lossy"

    def rewrite(self, gm: GraphModule, context: Context) -> GraphModule:
        path = "model.decoder.layers.1.final_layer_norm"
        gm.add_submodule(path, nn.LayerNorm(32))
        gm.add_submodule(FC1, nn.Linear(32, 64))
        return gm


def test_parameters_that_changed_without_a_node_are_told() -> None:
    gm = Pipeline((NameSites(), NewNorm())).run(fxquant.trace(opt()))
    record = info(gm).history[-1]
    assert (record.added, record.removed, record.replaced, record.sites) == (0, 0, 0, 1)
    changed = ("model.decoder.layers.1.final_layer_norm", FC1)
    assert record.delta.leaves == changed
    assert all(
        f"# other parameters in: {leaf}" in fxquant.inspect(gm).diff("new_norm") for leaf in changed
    )


def test_a_graph_changed_by_hand_has_no_diff_but_says_why() -> None:
    gm = fxquant.convert(opt(), "w8")
    for node in gm.graph.nodes:
        if node.op == "output":
            with gm.graph.inserting_before(node):
                gm.graph.call_function(torch.abs, node.args)
    with pytest.raises(InspectionError, match="changed outside of a pass after integerize"):
        fxquant.inspect(gm).diff("quantize")


def records(gm: GraphModule) -> dict[str, SiteRecord]:
    return {record.path: record for record in info(gm).site_records}


@torch.no_grad()
def site_input(gm: GraphModule, path: str) -> Tensor:
    """What the float layer at ``path`` receives in calibration, flat."""
    seen: list[Tensor] = []
    handle = gm.get_submodule(path).register_forward_pre_hook(
        lambda _, a: seen.append(a[0].flatten())
    )
    for batch in CALIBRATION:
        gm(batch)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(
    "scheme", ["w8a8-static:p95", "w8a8-static-asym:p95", "w8a8-static:absmax"]
)
def test_site_records_against_the_calibration_itself(scheme: str) -> None:
    gm = fxquant.convert(opt(), scheme, calibration=CALIBRATION)
    record, x = records(gm)[FC1], site_input(fxquant.trace(opt()), FC1)
    assert record.spec == scheme
    assert record.estimator == scheme.partition(":")[2]
    assert record.low is not None
    assert record.high is not None
    assert (record.seen_low, record.seen_high) == (float(x.min()), float(x.max()))
    # Histogram bins are 1/128 of a value wide: the share lies between those of wider ranges.
    wider, narrower = (
        float(((x < record.low * slack) | (x > record.high * slack)).double().mean())
        for slack in (1 + 2**-7, 1 / (1 + 2**-7))
    )
    assert record.clipped is not None
    assert wider <= record.clipped
    assert record.clipped <= narrower
    assert (record.clipped == 0) == (record.estimator == "absmax")
    assert sum(record.histogram) == x.numel()
    assert record.seen_low is not None
    assert record.seen_high is not None
    exact = torch.histc(x, len(record.histogram), record.seen_low, record.seen_high).cumsum(0)
    moved = (torch.tensor(record.histogram).cumsum(0) - exact).abs().max()
    assert moved <= 0.02 * x.numel()  # elements of a source bin that straddles two bins
    assert record.scale == float(gm.get_submodule(FC1).get_buffer("input_scale"))


@pytest.mark.parametrize("scheme", ["w8", "w4-g8-asym", "w3-tensor"])
def test_weight_sqnr_is_that_of_the_dequantized_weight(scheme: str) -> None:
    float_weight = opt().get_submodule(FC1).weight
    gm = fxquant.convert(opt(), scheme)
    node = next(n for n in gm.graph.nodes if n.name.endswith("layers_1_fc1_w"))
    seen: dict[str, Tensor] = {}

    def keep(n: torch.fx.Node, value: object) -> object:
        if n is node:
            assert isinstance(value, Tensor)
            seen["w"] = value
        return value

    Executor(gm).run(
        keep, input_ids=token_ids(1, 3), attention_mask=torch.ones(1, 3, dtype=torch.int64)
    )
    assert records(gm)[FC1].weight_sqnr == pytest.approx(sqnr_db(float_weight, seen["w"]), abs=1e-3)


def test_shared_inputs_share_their_records() -> None:
    found = records(fxquant.convert(opt(), "w8a8-static", calibration=CALIBRATION))
    block = "model.decoder.layers.0.self_attn"
    q, k, v = (found[f"{block}.{name}_proj"] for name in "qkv")
    assert q.scale == k.scale == v.scale
    assert q.histogram == k.histogram
    assert q.weight_sqnr != k.weight_sqnr


def test_bytes_and_parameters_are_counted_once() -> None:
    """The head is tied to the embedding."""
    model = opt()
    data = fxquant.inspect(fxquant.convert(model, "w8")).to_dict()
    assert data["parameters"] == model.num_parameters()
    assert data["bytes_before"] == [["fp32", 4 * model.num_parameters()]]
    after = dict(data["bytes_after"])
    linears = [m for m in model.model.decoder.layers.modules() if isinstance(m, nn.Linear)]
    weights = sum(m.weight.numel() for m in linears)
    rows = sum(m.weight.shape[0] for m in linears)
    assert after == {"int8": weights, "fp32": 4 * (model.num_parameters() - weights + rows)}


def test_to_dict_is_json_and_has_every_site() -> None:
    data = json.loads(json.dumps(two_layers().to_dict(), allow_nan=False))
    assert len(data["sites"]) == 14
    assert [record["name"] for record in data["history"]] == list(PASSES)
    assert {entry["path"] for entry in data["left_in_float"]} >= {"lm_head"}


@pytest.mark.parametrize("level", ["float", "observed", "qdq", "integer"])
def test_every_level_is_printed(level: str) -> None:
    gm = fxquant.convert(opt(), "w8a8-static", calibration=CALIBRATION, level=level)
    found = fxquant.inspect(gm)
    assert re.search(rf"^level +{level}$", str(found), re.MULTILINE)
    assert "fc2" in found.layer(1)
    assert "fc2" in found.site("1.fc2")
    assert FC1 in found.summary(fold=False) or "1.fc1" in found.summary(fold=False)


def test_a_traced_graph_is_printed() -> None:
    found = fxquant.inspect(fxquant.trace(opt()))
    assert "History" not in str(found)
    assert "Linear" in found.layer(0)
    with pytest.raises(InspectionError, match="there is none in this graph"):
        found.diff("quantize")
    with pytest.raises(TypeError, match=r"not made by fxquant\.trace"):
        fxquant.inspect(torch.fx.symbolic_trace(nn.Linear(1, 1)))


def test_notes_are_shown() -> None:
    gm = fxquant.convert(opt(), "w8")
    add_note(gm, "smooth", FC1, "not smoothed: its input comes from ReLU")
    assert f"- smooth: {FC1}: not smoothed" in str(fxquant.inspect(gm))
    assert "smooth: not smoothed" in fxquant.inspect(gm).site(FC1)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda i: i.layer(2), r"no layer 2: .* has layers 0\.\.1"),
        (lambda i: i.layer(-1), "no layer -1"),
        (lambda i: i.diff("integrize"), "did you mean integerize"),
        (lambda i: i.site("0.fc3"), r"did you mean model\.decoder\.layers\.0\.fc"),
        (
            lambda i: i.site("fc1"),
            r"no single site 'fc1'.*layers\.0\.fc1, model\..*1\.fc1",
        ),
        (lambda i: i.write_dot("/nowhere/block.dot"), "cannot write /nowhere"),
    ],
)
def test_what_is_not_there_is_named(ask: object, message: str) -> None:
    assert callable(ask)
    with pytest.raises(InspectionError, match=message):
        ask(two_layers())


def test_provenance_goes_back_to_the_trace() -> None:
    page = two_layers().site(FC1)
    assert f"trace: {FC1}\n" in page
    assert "integerize: x_dq, w, y -> acc, weight_scale_row, rescaled, y\n" in page
    gm = converted("opt", "w8a8-static")
    for node in describe(gm):
        assert isinstance(node, NodeText)
        assert (node.tag.origin == "trace") == (node.tag.made_from == ())


def test_histograms_count_codes_and_elements() -> None:
    page = two_layers().site(FC1)
    head, _, tail = page.partition("codes of the weight")
    counts = [int(n) for n in re.findall(r"\| (\d+)$", tail, re.MULTILINE)]
    assert sum(counts) == 64 * 32
    seen = [int(n) for n in re.findall(r"\| (\d+)$", head, re.MULTILINE)]
    assert sum(seen) == sum(batch.numel() for batch in CALIBRATION) * 32


def test_dot_draws_what_the_listing_lists() -> None:
    text = two_layers().dot(0)
    boxes = set(re.findall(r'^ *"(\w+)" \[', text, re.MULTILINE))
    edges = re.findall(r'"(\w+)" -> "(\w+)"', text)
    assert {end for edge in edges for end in edge} <= boxes
    assert any(a.endswith("fc1_acc") and b.endswith("fc1_rescaled") for a, b in edges)
    assert text.count("subgraph") == 6


def test_svg_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(InspectionError, match=r"pip install 'fxquant\[graph\]'"):
        two_layers().write_dot(tmp_path / "block.svg")
    two_layers().write_dot(tmp_path / "block.dot")
    assert (tmp_path / "block.dot").read_text() == two_layers().dot(0)


GRAPHVIZ = pytest.mark.needs_program(find_spec("graphviz"), "graphviz, of the graph extra")


@GRAPHVIZ
def test_svg_without_the_program_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InspectionError, match="program dot on the PATH"):
        two_layers().write_dot(tmp_path / "block.svg")


@GRAPHVIZ
@pytest.mark.needs_program(shutil.which("dot"), "Graphviz's program dot")
def test_svg(tmp_path: Path) -> None:
    two_layers().write_dot(tmp_path / "block.svg")
    assert "int_gemm" in (tmp_path / "block.svg").read_text()


def test_codes_are_where_the_listing_says() -> None:
    gm = converted("opt", "w8a8-static")
    module = gm.get_submodule("model.decoder.layers.0.fc1")
    assert isinstance(module, QuantizedParameters)
    assert module.get_buffer("weight").dtype == torch.int8
    listing = fxquant.inspect(gm).layer(0)
    assert re.search(r"^fc1 +weight +codes .* int8 +\[64, 32\]$", listing, re.MULTILINE)


def test_a_pass_that_ran_twice_has_two_diffs() -> None:
    found = two_layers("w8a8-dynamic+smooth+smooth(alpha=0.9)")
    diffs = [r["diff"] for r in found.to_dict()["history"] if r["name"] == "smooth"]
    assert [text.splitlines()[0].partition(",")[0] for text in diffs] == [
        "--- before smooth(alpha=0.5",
        "--- before smooth(alpha=0.9",
    ]
