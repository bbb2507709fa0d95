"""Fused operators and level kernels: the very bits of the plain operators and of level integer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.errors import CheckpointError, VerificationError
from fxquant.evaluation.perplexity import evaluate
from fxquant.ir import fused
from fxquant.ir.graph import Level, info, is_op, site_outputs, source_of, tag, update_info
from fxquant.ir.legal_forms import OPS, verify
from fxquant.numerics import cpu_int8
from fxquant.numerics.gemm import CHUNK, certified_chunk
from fxquant.numerics.kernels import cpu, table
from fxquant.passes import FuseKernels, Integerize
from fxquant.run.execution import Executor
from tests.architectures import ARCHITECTURES, llama, opt, padding_mask, token_ids
from tests.fused_calls import DTYPES, GRAINS, HALF, SINGLE, Calls, same
from tests.test_conversion import ACTIVATION_SCHEMES, ESTIMATED, EVERYTHING, WEIGHT_SCHEMES

SHAPES = st.lists(st.integers(0, 5), max_size=2).flatmap(
    lambda lead: st.integers(1, 300).map(lambda length: (*lead, length))
)
CALLS = {"seed": st.integers(0, 2**32 - 1), "shape": SHAPES, "dtype": st.sampled_from(DTYPES)}
ROUTES = ["as it is", "without int8", "reference"]


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The processor as it is, one without int8 instructions, and no fast implementation at all."""
    if request.param != "as it is":
        monkeypatch.setattr(cpu_int8, "exact_int_mm", lambda: False)
    if request.param == "reference":
        monkeypatch.setattr(fused, "implementation", lambda *_: None)
    return str(request.param)


def agree(name: str, *operands: Any) -> bool:
    """Whether every row of the table that takes the call gives what the composition gives."""
    wanted = getattr(fused, name)(*operands)
    rows = [row for row in table.TABLE if row.operator == name and row.device == "cpu"]
    found = [row.run(*operands) for row in rows if not row.why_not(*operands)]
    return all(same(each, wanted) for each in (*found, getattr(OPS, name)(*operands)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grain", GRAINS)
@given(**CALLS, bits=st.sampled_from([2, 4, 8]))
@settings(max_examples=40)
def test_rows(
    grain: str, symmetric: bool, seed: int, shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    x = Calls(seed, shape, dtype).input()
    if grain == "tensor" and not x.numel():
        return  # refused by both: no range
    low = -(2 ** (bits - 1))
    assert agree("quantize_rows", x, grain, symmetric, low + symmetric, -low - 1)


@given(**CALLS, affine=st.booleans())
@settings(max_examples=60)
def test_static_rows(seed: int, shape: tuple[int, ...], dtype: torch.dtype, affine: bool) -> None:
    calls = Calls(seed, shape, dtype)
    x, scale = calls.input(), torch.rand((), generator=calls.generator) * 0.1
    zero = torch.randint(-128, 128, (), generator=calls.generator, dtype=torch.int32)
    assert agree("quantize_static", x, scale, zero if affine else None, -128, 127)


@given(**CALLS, columns=st.integers(1, 70), packed=st.booleans())
@settings(max_examples=120)
def test_linears(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, columns: int, packed: bool
) -> None:
    operands = Calls(seed, shape, dtype).site(columns, 0, packed)
    chunk = CHUNK if packed else certified_chunk(operands[1], 128)
    assert agree("int_linear", *operands, chunk, packed)


@given(
    seed=CALLS["seed"],
    dtype=CALLS["dtype"],
    rows=st.integers(1, 70),
    small=st.sampled_from([1.0, 1e-23]),
)
@settings(max_examples=40)
def test_blocks_of_rows(seed: int, dtype: torch.dtype, rows: int, small: float) -> None:
    """Several of 16 rows, the last short; small products vanish, and no zero is negative."""
    calls = Calls(seed, (rows, 40), dtype)
    x, (codes, weight, scale, of_weight, *others) = calls.input(), calls.site(9, 0, False)
    site = (codes, weight, scale * small, of_weight * small, *others)
    blocks = mock.patch.object(cpu, "_BLOCK_BYTES", 1)
    with blocks, mock.patch.object(cpu, "_WORTH_ASKING", 0):
        for grain in GRAINS:
            for symmetric in (True, False):
                assert agree("quantize_rows", x, grain, symmetric, -128 + symmetric, 127)
        assert agree("quantize_static", x, torch.tensor(0.02), None, -128, 127)
        assert agree("int_linear", *site, certified_chunk(weight, 128), False)


@given(**CALLS, columns=st.integers(1, 40), packed=st.booleans(), group=st.integers(1, 320))
@settings(max_examples=120)
def test_groups(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, columns: int, packed: bool, group: int
) -> None:
    operands = Calls(seed, shape, dtype).site(columns, group, packed)
    assert agree("grouped_int_linear", *operands, group, packed)


@given(**CALLS, columns=st.integers(1, 40), packed=st.booleans(), group=st.integers(0, 64))
@settings(max_examples=120)
def test_weights_alone(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype, columns: int, packed: bool, group: int
) -> None:
    assert agree("dequant_linear", *Calls(seed, shape, dtype).weight_only(columns, group, packed))


def test_the_largest_sums() -> None:
    """Rows of the largest codes of one sign: 24 bits do not hold them, and a chunk says so."""
    codes = torch.full((3, 2048), -128, dtype=torch.int8)
    weight = torch.full((5, 2048), -128, dtype=torch.int8)
    scale, nan = torch.rand(3, 1), torch.zeros(3, 1)
    operands = (codes, weight, scale, torch.rand(5, 1), None, None, None, None, nan)
    chunk = certified_chunk(weight, 128)
    assert chunk == CHUNK
    assert agree("int_linear", *operands, chunk, False)
    exact = (codes.double() @ weight.double().t() * scale).float()
    found = OPS.int_linear(*operands[:3], torch.tensor(1.0), *operands[4:], chunk, False)
    assert torch.equal(found, exact.float())


def test_reasons() -> None:
    """Each row says why it does not take a call; what is no plain tensor goes to none."""
    call = Calls(1, (3, 70), SINGLE).weight_only(8, 20, False)
    assert table.reasons("dequant_linear", *call) == [
        ("groups as views", "70 columns are no whole number of groups of 20")
    ]
    x = call[0].requires_grad_()
    assert [why for _, why in table.reasons("dequant_linear", x, *call[1:])] == [
        "a gradient is asked for"
    ]
    wrapped = torch.Tensor._make_subclass(nn.Buffer, call[0].detach())
    assert table.unusual((wrapped,)).endswith("is no plain tensor")
    assert table.implementation("dequant_linear", x, *call[1:]) is None


SCHEMES = [*ACTIVATION_SCHEMES, *WEIGHT_SCHEMES]
SCHEMES = [scheme for scheme in SCHEMES if scheme not in ESTIMATED]
QUICK = (
    *(("opt", "w8a8-dynamic-token", HALF), ("opt", "w4-g12-asym/a8-static-asym:absmax", SINGLE)),
    *(("llama", EVERYTHING, DTYPES[2]), ("gpt2", "w8-asym/a8-dynamic-asym", SINGLE)),
    *(("bloom", "w4-g12-asym", HALF), ("qwen3", "w8a8-static", DTYPES[2])),
)
EACH = [
    (name, scheme, dtype) for name in ("opt", "llama") for scheme in SCHEMES for dtype in DTYPES
]
EACH += [(name, s, d) for name in ARCHITECTURES for s in ("w8a8-dynamic", "w4-g12") for d in DTYPES]
SLOW = [pytest.param(*each, marks=pytest.mark.slow) for each in EACH if each not in QUICK]


@functools.cache
def traced(name: str, dtype: torch.dtype) -> GraphModule:
    return fxquant.trace(ARCHITECTURES[name]().to(dtype))


@functools.cache
def integer(name: str, scheme: str, dtype: torch.dtype = SINGLE) -> GraphModule:
    return fxquant.convert(traced(name, dtype), scheme, calibration=[token_ids(2, 12, seed=5)])


def values(gm: GraphModule, **inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and every site's output and codes."""
    found: dict[str, Tensor] = {}
    quantizers = (OPS.quantize, OPS.quantize_static, OPS.quantize_rows)

    def keep(node: torch.fx.Node, value: Any) -> Any:
        if tag(node).is_output:
            found[f"{tag(node).site} y"] = value
        if any(is_op(node, each.default) for each in quantizers):
            codes = value[0] if isinstance(value, tuple) else value
            found.setdefault(f"{tag(node).site} codes", codes)
        return value

    with torch.no_grad():
        return Executor(gm).run(keep, **inputs), found


@pytest.mark.parametrize(("name", "scheme", "dtype"), [*QUICK, *SLOW])
def test_a_graph_is_the_same_bit_for_bit(
    name: str, scheme: str, dtype: torch.dtype, route: str
) -> None:
    plain = integer(name, scheme, dtype)
    fast = FuseKernels()(plain)
    assert info(fast).level == Level.KERNELS
    forms = (OPS.int_gemm, OPS.grouped_gemm, OPS.rescale, OPS.add_bias, OPS.choose_qparams)
    assert not any(is_op(n, form.default) for n in fast.graph.nodes for form in forms)
    for mask in ("none", "left"):
        inputs = {"input_ids": token_ids(2, 17), "attention_mask": padding_mask(2, 17, mask)}
        (logits, wanted), (found, got) = values(plain, **inputs), values(fast, **inputs)
        assert same(found, logits)
        assert got.keys() == wanted.keys()
        assert all(same(got[place], wanted[place]) for place in wanted)


def test_convert_goes_there_and_the_pipeline_says_exact() -> None:
    graph = fxquant.convert(opt(), "w8a8-dynamic-token", level="kernels")
    last = info(graph).history[-1]
    assert (last.name, last.difference) == ("fuse_kernels", 0)
    with torch.no_grad():
        assert same(graph(token_ids(2, 9)), integer("opt", "w8a8-dynamic-token")(token_ids(2, 9)))


@pytest.mark.parametrize("scheme", ["fp", "fp32-gemm"])
def test_float_schemes_have_nothing_to_fuse(scheme: str) -> None:
    graph = fxquant.convert(traced("opt", SINGLE), scheme, level="kernels")
    assert info(graph).level == Level.FLOAT


def test_what_is_known_of_no_kernel_stays_with_its_reason() -> None:
    text = '{"scheme": "w8a8-dynamic+attn8", "overrides": {"embeddings": "w8"}}'
    plain = fxquant.convert(traced("opt", SINGLE), text)
    fast = FuseKernels()(plain)
    notes = {note.site: note.text for note in info(fast).notes if note.origin == "fuse_kernels"}
    roles = {site.path: site.role for site, _ in site_outputs(fast)}
    assert {roles[path] for path in notes} == {"embeddings"}
    assert all(text.startswith("stays as at level integer: ") for text in notes.values())
    with torch.no_grad():
        assert same(fast(token_ids(2, 9)), plain(token_ids(2, 9)))


ATTENTION = ("w8a8-dynamic+attn8", "w8a8-static+attn8", "w8a8-dynamic-token+attn8+kv8", "w4+attn8")
PRODUCTS = [("opt", each, SINGLE) for each in ATTENTION[:2]]
PRODUCTS += [("llama", ATTENTION[2], HALF)]
OTHERS = [
    pytest.param(name, scheme, dtype, marks=pytest.mark.slow)
    for name in ("opt", "llama", "bloom")
    for scheme in ATTENTION
    for dtype in DTYPES
    if (name, scheme, dtype) not in PRODUCTS
]


@pytest.mark.parametrize(("name", "scheme", "dtype"), [*PRODUCTS, *OTHERS])
def test_attentions_products_bit_for_bit(name: str, scheme: str, dtype: torch.dtype) -> None:
    plain = integer(name, scheme, dtype)
    fast = FuseKernels()(plain)
    assert not any(note.origin == "fuse_kernels" for note in info(fast).notes)
    forms = (OPS.int_matmul, OPS.rescale, OPS.choose_qparams, OPS.quantize)
    assert not any(is_op(n, form.default) for n in fast.graph.nodes for form in forms)
    products = [site for site in info(fast).sites if site.role == "matmul"]
    assert sum(is_op(n, OPS.int_product.default) for n in fast.graph.nodes) == len(products) > 1
    for mask in ("none", "left"):
        inputs = {"input_ids": token_ids(2, 17), "attention_mask": padding_mask(2, 17, mask)}
        (logits, wanted), (found, got) = values(plain, **inputs), values(fast, **inputs)
        assert same(found, logits)
        ours = {f"{site.path} y" for site in products}
        assert all(same(got[place], wanted[place]) for place in ours)


def test_products_on_another_grid_stay_and_say_which() -> None:
    fast = FuseKernels()(integer("opt", "w8a8-dynamic+attn8(format=fp8)"))
    notes = {note.site: note.text for note in info(fast).notes if note.origin == "fuse_kernels"}
    assert set(notes) == {site.path for site in info(fast).sites if site.role == "matmul"}
    assert all(text.endswith("its sums are made by code_matmul.default") for text in notes.values())


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 40)] * 3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_products(seed: int, sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """What the plain operators give, NaN rows of the left operand too."""
    calls = Calls(seed, sizes[:3], dtype)
    left, right, *scales, nan = calls.product(*sizes[3:])
    sums = OPS.int_matmul(left, right)
    wanted = OPS.rescale(sums, *scales, None, None, None, None, None) + nan.float()
    assert same(OPS.int_product(left, right, *scales, nan), wanted.to(dtype))
    assert agree("int_product", left, right, *scales, nan)


def edited() -> Iterator[tuple[str, GraphModule]]:
    """An integer graph, changed at one site so that it is no longer what integerize wrote."""
    for what in ("read twice", "other codes"):
        graph = fxquant.convert(traced("opt", SINGLE), "w8a8-static", calibration=[token_ids(2, 9)])
        node = next(n for n in graph.graph.nodes if is_op(n, OPS.rescale.default))
        sums = source_of(node)
        if what == "read twice":
            with graph.graph.inserting_after(node):
                other = graph.graph.call_function(torch.add, (node, 0.0))
            (reader,) = (user for user in node.users if user is not other)
            with graph.graph.inserting_after(reader):
                zero = graph.graph.call_function(torch.mul, (other, 0.0))
            with graph.graph.inserting_after(zero):
                total = graph.graph.call_function(torch.add, (reader, zero))
            for user in list(reader.users):
                if user is not total:
                    user.replace_input_with(reader, total)
        else:
            with graph.graph.inserting_before(sums):
                copy = graph.graph.call_method("clone", (source_of(sums),))
            sums.args = (copy, *sums.args[1:])
        graph.recompile()
        yield what, graph


def test_edited_sites_stay_as_they_are() -> None:
    for what, plain in edited():
        fast = FuseKernels()(plain)
        (note,) = (note for note in info(fast).notes if note.origin == "fuse_kernels")
        assert "stays as at level integer: " in note.text, what
        assert any(is_op(node, OPS.rescale.default) for node in fast.graph.nodes)
        assert sum(is_op(node, OPS.int_linear.default) for node in fast.graph.nodes) > 4
        with torch.no_grad():
            assert same(fast(token_ids(2, 9)), plain(token_ids(2, 9)))


def test_fused_forms_stand_at_level_kernels_only() -> None:
    graph = FuseKernels()(integer("opt", "w8a8-dynamic-token"))
    update_info(graph, level=Level.INTEGER)
    with pytest.raises(VerificationError, match="quantize_rows may not stand at level integer"):
        verify(graph, "a test")


def test_scales_must_fit() -> None:
    graph = FuseKernels()(integer("opt", "w8a8-dynamic-token"))
    node = next(n for n in graph.graph.nodes if is_op(n, OPS.int_linear.default))
    owner = graph.get_submodule(tag(node).site or "")
    owner.weight_scale = owner.get_buffer("weight_scale")[1:]
    with pytest.raises(VerificationError, match="31 weight scales for 32 output columns"):
        verify(graph, "a test")


def test_passes_one_by_one_and_only_from_level_integer() -> None:
    qdq = fxquant.convert(traced("llama", SINGLE), "w8-tensor-asym/a8-dynamic-token", level="qdq")
    with pytest.raises(VerificationError, match="pass fuse_kernels needs level integer"):
        FuseKernels()(qdq)
    fast = FuseKernels()(Integerize()(qdq))
    assert any(is_op(node, OPS.int_linear.default) for node in fast.graph.nodes)


def test_save_says_what_to_do_and_that_works(tmp_path: Any) -> None:
    plain = integer("llama", "w8a8-static-asym")
    fast = FuseKernels()(plain)
    with pytest.raises(CheckpointError, match=r"level kernels is not saved: .*FuseKernels\(\)"):
        fxquant.save(fast, tmp_path / "fast")
    assert not (tmp_path / "fast").exists()
    fxquant.save(plain, tmp_path / "plain")
    again = FuseKernels()(fxquant.load(tmp_path / "plain"))
    with torch.no_grad():
        assert same(again(token_ids(2, 9)), fast(token_ids(2, 9)))


@pytest.mark.parametrize("dtype", [HALF, torch.float64])
def test_it_follows_the_dtype_as_level_integer_does(dtype: torch.dtype) -> None:
    plain = fxquant.convert(traced("opt", SINGLE), "w8a8-dynamic-token")
    fast = FuseKernels()(plain).to(dtype)
    plain = plain.to(dtype)
    with torch.no_grad():
        assert same(fast(token_ids(2, 9)), plain(token_ids(2, 9)))


def test_a_compiler_sees_through() -> None:
    model = llama(num_hidden_layers=1)
    plain = fxquant.convert(model, "w4-g12-asym/a8-dynamic-token-asym")
    fast = torch.compile(FuseKernels()(plain), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert same(fast(token_ids(2, 9)), plain(token_ids(2, 9)))


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-dynamic-token-asym", "w8a8-dynamic", "w8"])
def test_evaluation_counts_the_same(scheme: str) -> None:
    plain = integer("llama", scheme)
    one, other = (evaluate(gm, token_ids(4, 20)) for gm in (plain, FuseKernels()(plain)))
    assert torch.equal(one.losses, other.losses)
    assert one.share_clipped == other.share_clipped


def test_streamed_graphs_too(tmp_path: Any) -> None:
    fxquant.save(integer("llama", "w4/a8-dynamic-token"), tmp_path / "graph")
    streamed = FuseKernels()(fxquant.load(tmp_path / "graph", stream=True))
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert same(Executor(streamed).run(None, input_ids=ids), llama_logits(ids))


def llama_logits(ids: Tensor) -> Tensor:
    result = integer("llama", "w4/a8-dynamic-token")(ids)
    assert isinstance(result, Tensor)
    return result


def test_a_listing_names_the_parts() -> None:
    listing = fxquant.inspect(fxquant.convert(llama(), "w4-g12/a8-dynamic", level="kernels"))
    lines = [" ".join(line.split()) for line in listing.layer(0).splitlines()]
    at = next(i for i, line in enumerate(lines) if "down_proj x quantize_rows" in line)
    text = " ".join(lines[at : at + 6])
    assert "x.codes @ weight.T" in text
    assert "x.scale" in text
    assert "12 columns a scale" in text


def test_sums_in_floats_leave_no_negative_zero() -> None:
    codes, weight = torch.zeros(300, 1, dtype=torch.int8), -torch.ones(300, 1, dtype=torch.int8)
    half = torch.full((300, 1), 0.5)
    operands = (codes, weight, half, half, None, None, None, None, torch.zeros(300, 1))
    assert agree("int_linear", *operands, 0, False)
