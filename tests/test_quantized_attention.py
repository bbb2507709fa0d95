"""attn8, kv8, kv4 and the decomposition: equal in float, exact in integers, listed as sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.fx import GraphModule, Node
from transformers import PreTrainedModel

import fxquant
from fxquant.checkpoint.manifest import MANIFEST, write_manifest
from fxquant.errors import CheckpointError, ModelError, SchemeError, VerificationError
from fxquant.ir.graph import info, is_op, site_outputs
from fxquant.ir.legal_forms import OPS
from fxquant.ir.operands import op_name
from fxquant.numerics.gemm import batched_int_matmul
from fxquant.passes import DecomposeAttention
from fxquant.run.execution import Executor
from fxquant.run.probe import relative_difference
from fxquant.structure.attention import written_out
from tests.architectures import ARCHITECTURES, llama, opt, padding_mask, token_ids
from tests.more_architectures import MORE

EVERY = {**ARCHITECTURES, **MORE}
FUSED = [name for name in ARCHITECTURES if name not in ("gemma2-eager", "gpt-neo", "gptj", "bloom")]


def inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids(3, 11), "attention_mask": padding_mask(3, 11, "left")}


@torch.no_grad()
def logits(graph: GraphModule) -> Tensor:
    found = graph(**inputs())
    assert isinstance(found, Tensor)
    return found[inputs()["attention_mask"].bool()]


@torch.no_grad()
def node_values(graph: GraphModule) -> dict[Any, Any]:
    values: dict[Any, Any] = {}

    def keep(node: Node, value: Any) -> Any:
        values[node] = value
        return value

    Executor(graph).run(keep, **inputs())
    return values


@pytest.mark.parametrize("name", FUSED)
def test_written_out_attention_is_equal(name: str) -> None:
    """To 1e-5, with and without a mask, also in rows of padding that see nothing; and no fused
    call is left."""
    before = fxquant.convert(ARCHITECTURES[name](), "fp")
    after = DecomposeAttention()(before)
    with torch.no_grad():
        for given in (inputs(), {"input_ids": inputs()["input_ids"]}):
            assert relative_difference(before(**given), after(**given)) <= 1e-5
    targets = [node.target for node in after.graph.nodes]
    assert OPS.attention.default in [node.target for node in before.graph.nodes]
    assert OPS.attention.default not in targets
    assert targets.count(torch.ops.aten._safe_softmax.default) == len(info(after).blocks)


def loud(gain: float) -> PreTrainedModel:
    """A Llama in fp16 with heads of 64 channels, its queries and keys ``gain`` times the usual."""
    model = llama(1, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.weight.data *= gain
    return model.half()


@pytest.mark.parametrize("scheme", ["fp+kv8", "w8a8-dynamic-token+attn8"])
def test_scores_that_fit_half_precision_only_when_scaled(scheme: str) -> None:
    graph = fxquant.convert(loud(50), scheme)
    assert bool(logits(graph).isfinite().all())
    values = node_values(DecomposeAttention()(fxquant.convert(loud(50), "fp")))
    products = [x for n, x in values.items() if is_op(n, torch.matmul) and x.shape[-1] == 11]
    assert len(products) == 2
    largest = max(float(scores.abs().max()) for scores in products)
    assert largest < torch.finfo(torch.float16).max < largest * 64**0.5


@pytest.mark.parametrize("bits", [4, 8])
def test_a_cache_that_overflows_is_refused(bits: int) -> None:
    said = r"after decompose_attention: .*: where fp16 overflows, give"
    with pytest.raises(VerificationError, match=said):
        fxquant.convert(loud(250), f"fp+kv{bits}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "llama"])
def test_half_precision_loses_little_more(name: str, dtype: torch.dtype) -> None:
    """Also OPT's mask in fp16, whose least number swallows the scores that it is added to."""
    scheme = "w8a8-dynamic-token+attn8+kv8"
    model = ARCHITECTURES[name]()
    expected, whole = (logits(fxquant.convert(model, s)) for s in ("fp", scheme))
    half = logits(fxquant.convert(model.to(dtype), scheme))
    assert half.dtype == dtype
    assert (half.float() - expected).norm() < 1.5 * (whole - expected).norm()


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a8-dynamic-token", "w8a8-static:absmax"])
@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "gemma2-eager", "gptj"])
def test_attn8_makes_sites_that_lose_little(name: str, scheme: str) -> None:
    model, data = ARCHITECTURES[name](), [inputs()]
    plain = fxquant.convert(model, scheme, calibration=data)
    coded = fxquant.convert(model, f"{scheme}+attn8", calibration=data)
    products = [site for site in info(coded).sites if site.role == "matmul"]
    assert [site.path.rpartition(".")[2] for site in products] == ["qk", "pv"] * 2
    left = [entry.path for entry in info(coded).left_in_float]
    assert not [p for p in left if p.startswith("attention")]
    assert "attention x2" in [e.path for e in info(plain).left_in_float] or (
        "eager" in name or name == "gptj"
    )
    sums = [node for node in coded.graph.nodes if is_op(node, OPS.int_matmul.default)]
    assert len(sums) == 4
    expected, found = logits(fxquant.convert(model, "fp")), logits(coded)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.2


# baddbmm with ALiBi's bias, bmm behind a maximum, sinks joined to the scores.
OWN_FORMS = ("bloom", "xglm", "gpt-oss")


@pytest.mark.parametrize("name", OWN_FORMS)
def test_products_of_other_forms_are_equal(name: str) -> None:
    """To 64 roundings, also in rows of padding; kv8 stores their keys and values too."""
    before = fxquant.convert(EVERY[name](), "fp")
    after = DecomposeAttention()(before)
    with torch.no_grad():
        difference = relative_difference(before(**inputs()), after(**inputs()))
    assert difference <= 64 * torch.finfo(torch.float32).eps
    assert not [n for n in after.graph.nodes if op_name(n) in ("bmm", "baddbmm")]
    cached = fxquant.convert(before, "fp+kv8")
    assert sum(is_op(n, OPS.store_kv.default) for n in cached.graph.nodes) == 4


@pytest.mark.parametrize("scheme", ["w8a8-dynamic-token+attn8", "w8a8-static:absmax+attn8"])
@pytest.mark.parametrize("name", ["llama", *OWN_FORMS])
def test_a_product_by_hand(name: str, scheme: str) -> None:
    """The integer site from the values in front of it, in float64: codes, sums, scales."""
    graph = fxquant.convert(EVERY[name](), scheme, calibration=[inputs()])
    assert len([site for site in info(graph).sites if site.role == "matmul"]) == 4
    values = node_values(graph)
    checked = 0
    for site, node in site_outputs(graph):
        if site.role != "matmul":
            continue
        acc, left_scale, right_scale = node.args[:3]
        left, right = (values[operand] for operand in acc.args)  # type: ignore[union-attr]
        exact = left.long() @ right.long()
        assert torch.equal(values[acc].long(), exact)
        scaled = exact.double() * values[left_scale].double() * values[right_scale].double()
        assert torch.allclose(values[node].double(), scaled, rtol=1e-6)
        assert int(left.abs().max()) <= 127
        checked += 1
    assert checked == 4


@pytest.mark.parametrize("scheme", ["fp8+attn8(format=fp8)", "w8a8-static+attn8(format=e5m2)"])
def test_a_product_of_float8_codes_by_hand(scheme: str) -> None:
    """Sums of products of codes in float64, exact, then the scales; operands stay in a byte."""
    graph = fxquant.convert(llama(), scheme, calibration=[inputs()])
    values, checked = node_values(graph), 0
    for site, node in site_outputs(graph):
        if site.role != "matmul":
            continue
        acc, left_scale, right_scale = node.args[:3]
        left, right = (values[operand] for operand in acc.args[:2])  # type: ignore[union-attr]
        assert left.element_size() == right.element_size() == 1
        sums = left.double() @ right.double()
        assert torch.allclose(values[acc].double(), sums, rtol=1e-12)
        scaled = sums * values[left_scale].double() * values[right_scale].double()
        assert torch.allclose(values[node].double(), scaled, rtol=1e-6)
        checked += 1
    assert checked == 4


def test_float8_forms_are_spelled_and_told() -> None:
    scheme = "fp8+attn8(format=fp8)+kv8(format=e5m2)"
    graph = fxquant.convert(llama(), scheme)
    assert "+attn8(format=fp8)+kv8(format=e5m2)" in info(graph).scheme
    left, right = (r for r in info(graph).site_records if r.path.endswith("0.self_attn.pv"))
    assert (left.spec, right.spec) == ("ae4m3-dynamic-token", "ae4m3-dynamic")
    view = fxquant.inspect(graph)
    assert "left_q @ right_q, e4m3 by e4m3" in view.site("layers.1.self_attn.pv")
    assert "keys and values in e5m2" in str(view)
    with pytest.raises(SchemeError, match="format must be int8, fp8, e4m3 or e5m2, got 'fp4'"):
        fxquant.recipe("fp8+attn8(format=fp4)")
    with pytest.raises(SchemeError, match="kv4 has no option format"):
        fxquant.recipe("fp8+kv4(format=fp8)")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"e5m2"]', '"e4m3"]', "a cache of e4m3, and the passes .* are: kv8 in e5m2"),
        ('"e4m3","e4m3"]', '"e4m3","e5m2"]', "products of e4m3 by e5m2"),
        ("attn8(format=fp8)", "attn8(format=e5m2)", "no such pass is in the graph's history"),
    ],
)
def test_a_saved_graph_keeps_its_formats(old: str, new: str, message: str, tmp_path: Path) -> None:
    graph = fxquant.convert(llama(), "fp8+attn8(format=fp8)+kv8(format=e5m2)")
    fxquant.save(graph, tmp_path / "saved")
    assert torch.equal(logits(fxquant.load(tmp_path / "saved")), logits(graph))
    path = tmp_path / "saved" / "graph.json"
    text = path.read_text().replace(", ", ",")
    assert old in text
    path.write_text(text.replace(old, new, 1))
    (tmp_path / "saved" / MANIFEST).unlink()
    write_manifest(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        fxquant.load(tmp_path / "saved")


def test_integers_equal_their_simulation() -> None:
    for scheme in ("w8a8-dynamic-token+attn8+kv8", "w8a8-static:absmax+attn8"):
        levels = [
            logits(fxquant.convert(opt(), scheme, calibration=[inputs()], level=level))
            for level in ("qdq", "integer")
        ]
        assert relative_difference(*levels) < 0.02  # rounding flips behind reordered sums


def test_overrides_leave_products_in_float() -> None:
    scheme = '{"scheme": "w8a8-dynamic+attn8", "overrides": {"*.pv": "fp"}}'
    graph = fxquant.convert(opt(), scheme)
    assert sum(is_op(n, OPS.int_matmul.default) for n in graph.graph.nodes) == 2
    left = {entry.path: entry.reason for entry in info(graph).left_in_float}
    assert "override" in left["model.decoder.layers.0.self_attn.pv"]


def test_inspect_shows_both_operands() -> None:
    graph = fxquant.convert(llama(), "w8a8-static:absmax+attn8+kv8", calibration=[inputs()])
    path = "model.layers.1.self_attn.pv"
    left, right = (r for r in info(graph).site_records if r.path == path)
    assert (left.operand, right.operand) == ("left", "right")
    assert left.spec == right.spec == "a8-static:absmax"
    assert left.weight_sqnr is None
    assert left.low == -1  # of probabilities, the first token's being 1
    assert left.scale == pytest.approx(1 / 127)
    for record in (left, right):
        assert record.scale == float(graph.get_buffer(f"{path}.{record.operand}_scale"))
        assert sum(record.histogram) > 0
    view = fxquant.inspect(graph)
    assert "self_attn.qk (2) - - a8-static" in " ".join(str(view).split())
    page = view.site("layers.1.self_attn.pv")
    assert "matmul, two activations, a8-static:absmax" in page
    assert "left_q @ right_q" in page
    assert "left: scale 0.00787402" in page
    assert "8 bits" in view.diff("kv8")
    assert "integerize: left_dq, right_dq, y -> acc, right_scales, y" in page
    rows = {row["path"]: row for row in view.to_dict()["sites"]}
    assert [record["operand"] for record in rows[path]["records"]] == ["left", "right"]


def test_inspect_shows_dynamic_operands() -> None:
    graph = fxquant.convert(opt(), "w8a8-dynamic-token+attn8")
    left, right = (r for r in info(graph).site_records if r.path.endswith("0.self_attn.pv"))
    assert (left.spec, right.spec) == ("a8-dynamic-token", "a8-dynamic")
    assert left.scale is None
    text = fxquant.inspect(graph).summary(markdown=True)
    line = next(line for line in text.splitlines() if ".qk" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["-", "-", "a8-dynamic-token", "-", "each batch", "-", "-"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 2500), st.integers(1, 5), st.integers(0, 2**20))
def test_batched_products_are_exact(rows: int, length: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-128, 128, (2, rows, length), generator=generator, dtype=torch.int8)
    right = torch.randint(-128, 128, (2, length, columns), generator=generator, dtype=torch.int8)
    if seed % 3 == 0:
        left, right = left.fill_(-128), right.fill_(-128)  # the largest sum there is
    assert torch.equal(batched_int_matmul(left, right).long(), left.long() @ right.long())


@pytest.mark.parametrize("bits", [4, 8])
def test_store_kv_rounds_per_token_and_head(bits: int) -> None:
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2] *= 1000
    stored = torch.ops.fxquant.store_kv(x, bits)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    assert bool(((stored - x).abs() <= step * 1.001).all())
    assert not torch.equal(stored, x)
    levels = torch.stack([row.unique().numel() * torch.ones(1) for row in stored.view(-1, 16)])
    assert int(levels.max()) <= 2**bits


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "gemma2-eager", "qwen3", "phi"])
def test_caches_cost_more_the_fewer_bits(name: str) -> None:
    model = ARCHITECTURES[name]()
    expected = logits(fxquant.convert(model, "fp"))
    graphs = {s: fxquant.convert(model, f"fp+{s}") for s in ("kv8", "kv4")}
    errors = {s: float((logits(g) - expected).norm() / expected.norm()) for s, g in graphs.items()}
    assert 0 < errors["kv8"] < 0.05
    assert 4 * errors["kv8"] < errors["kv4"] < 0.6
    stores = [n for n in graphs["kv8"].graph.nodes if is_op(n, OPS.store_kv.default)]
    assert len(stores) == 2 * len(info(graphs["kv8"]).blocks)


def test_all_three_compose_and_bad_ones_say_why() -> None:
    graph = fxquant.convert(llama(), "w8a8-dynamic-token+attn8+kv8")
    names = [node.target for node in graph.graph.nodes]
    assert names.count(OPS.store_kv.default) == names.count(OPS.int_matmul.default) == 4
    turned = fxquant.convert(llama(), "w8a8-dynamic-token+kv8+attn8")
    assert torch.equal(logits(turned), logits(graph))
    with pytest.raises(SchemeError, match="attn8 goes with one that does"):
        fxquant.convert(opt(), "fp+attn8")
    with pytest.raises(SchemeError, match="stored in codes already"):
        fxquant.convert(opt(), "w8+kv8+kv4")
    with pytest.raises(ModelError, match="no attention found"):
        written_out(fxquant.trace(llama()), "attn8")  # fused: it is written out before
