"""torch.ops.fxquant: equal to the plain functions, no aliases, seen through by compilers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.formats.packing import pack_int4
from fxquant.ir import fused, grid_operators, operators
from fxquant.numerics import cpu_int8, quantization
from fxquant.numerics.gemm import CHUNK

OPS = torch.ops.fxquant
SEEDS = st.integers(0, 2**32 - 1)
NAMES = (
    "attention",
    "choose_qparams",
    "quantize",
    "dequantize",
    "choose_scale",
    "choose_global_scale",
    "choose_group_scales",
    "decode_scales",
    "quantize_to",
    "decode",
    "code_gemm",
    "grouped_code_gemm",
    "code_matmul",
    "store_kv_to",
    "unpack_int4",
    "int_gemm",
    "code_sum",
    "column_scales",
    "grouped_gemm",
    "rescale",
    "add_bias",
)


def int8(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def int32(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int32)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.1 + 0.01


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """One call of each operator that uses all of its tensors, activations in ``dtype``."""
    x, like = torch.randn(2, 3, 16).to(dtype), torch.empty(0, dtype=dtype)
    token, shift = scales(2, 3, 1), int32(2, 3, 1)
    heads = [torch.randn(2, 4, 3, 8).to(dtype) for _ in "qkv"]
    packed = torch.randint(0, 256, (5, 8), dtype=torch.uint8)
    return {
        "attention": (*heads, torch.randn(2, 1, 3, 3).to(dtype), 0.4),
        "choose_qparams": (x, "token", False, -128, 127),
        "quantize": (x, token, shift, -128, 127, torch.int8),
        "dequantize": (int8(2, 3, 16), token, shift, 0, like),
        "choose_scale": (x, "token", "int4"),
        "choose_global_scale": (x, "e2m1", "e4m3"),
        "choose_group_scales": (x, torch.tensor(0.01), "e2m1", "e4m3", 6),
        "decode_scales": (torch.randint(100, 150, (5, 3), dtype=torch.uint8), None, "e8m0"),
        "quantize_to": (x, scales(2, 3, 3), "e2m1", 6),
        "decode": (torch.randint(0, 256, (5, 8), dtype=torch.uint8), "int4", 15),
        "code_gemm": (int8(2, 3, 16), int8(5, 16), shift, int32(5, 1), "int8", "int8-asym"),
        "grouped_code_gemm": (
            *(torch.randint(0, 16, (2, 3, 15), dtype=torch.uint8), packed),
            *(scales(2, 3, 3), scales(5, 2), None, None, "e2m1", "e2m1", 6, 9),
        ),
        "code_matmul": (
            *(torch.randint(0, 16, (2, 3, k, 4), dtype=torch.uint8) for k in (5, 4)),
            *("e2m1", "e2m1"),
        ),
        "store_kv_to": (torch.randn(2, 3, 5, 16).to(dtype), "e5m2"),
        "unpack_int4": (torch.randint(0, 256, (5, 8), dtype=torch.uint8), 15),
        "int_gemm": (int8(2, 3, 16), int8(5, 16), 0),
        "code_sum": (int8(2, 3, 16),),
        "column_scales": (scales(), x),
        "grouped_gemm": (
            *(int8(2, 3, 16), int8(5, 16), scales(5, 3), shift, int32(5, 3), int32(5, 3)),
            6,
        ),
        "rescale": (
            *(int32(2, 3, 5), token, scales(5), shift, int32(5), int32(5), int32(2, 3, 1)),
            like,
        ),
        "add_bias": (torch.randn(2, 3, 5), torch.randn(5).to(dtype), like),
    }


def tensors(values: Any) -> list[Tensor]:
    return [v for v in (values if isinstance(values, tuple) else (values,)) if torch.is_tensor(v)]


# --- registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_schema_promises_no_alias_and_no_mutation(name: str) -> None:
    schema = getattr(OPS, name).default._schema
    assert [value.alias_info for value in (*schema.arguments, *schema.returns)] == [None] * (
        len(schema.arguments) + len(schema.returns)
    )
    assert getattr(OPS, name).overloads() == ["default"]


def test_these_are_all_operators() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("fxquant::") for name in registered if name.startswith("fxquant::")}
    routes = {
        *("causal_attention_cpu", "int_gemm_cuda", "int_matmul", "int_matmul_cpu", "store_kv")
    }
    assert ours == {*NAMES, *routes, *(composed.__name__ for composed in fused.COMPOSED.values())}


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_equals_its_plain_function(name: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        args = calls(dtype)[name]
        ours = tensors(getattr(OPS, name)(*args))
        plain = tensors({**vars(operators), **vars(grid_operators)}[name](*args))
        for a, b in zip(ours, plain, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_every_operator_gives_a_result_that_depends_on_its_input() -> None:
    for name, args in calls().items():
        first = tensors(getattr(OPS, name)(*args))
        second = tensors(getattr(OPS, name)(args[0] + 1, *args[1:]))
        if name not in ROUNDED:
            assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True)), name


ROUNDED = (
    *("choose_qparams", "quantize", "choose_scale", "choose_global_scale", "choose_group_scales"),
    "quantize_to",
)
NO_OP_CASTS: dict[str, tuple[Any, ...]] = {
    "sums that are fp32 already": (OPS.rescale, torch.randn(2, 5), torch.ones(()), *[None] * 6),
    "rescale by ones": (
        OPS.rescale,
        torch.randn(2, 5),
        torch.ones(()),
        torch.ones(()),
        *[None] * 5,
    ),
    "a zero bias": (OPS.add_bias, torch.randn(2, 5), torch.zeros(5), torch.empty(0)),
    "an empty bias's shape": (OPS.add_bias, torch.randn(1), torch.zeros(()), torch.empty(0)),
    "an even length": (OPS.unpack_int4, torch.zeros(3, 4, dtype=torch.uint8), 8),
    "one row": (OPS.int_gemm, int8(1, 4), int8(3, 4), 0),
    "one column": (OPS.code_sum, int8(3, 1)),
    "one group": (OPS.grouped_gemm, int8(2, 4), int8(3, 4), torch.ones(3, 1), *[None] * 3, 4),
    "codes times one": (OPS.dequantize, int8(2, 3), torch.ones(()), None, 0, torch.empty(0)),
    "scales as they are": (OPS.decode_scales, torch.ones(3), None, "fp32"),
    "one group of codes": (
        *(OPS.grouped_code_gemm, int8(2, 4), int8(3, 4), None, torch.ones(3, 1), None, None),
        *("int8", "int8", 0, 4),
    ),
    "unscaled sums": (OPS.rescale, torch.randn(2, 5), *[None] * 7),
    "absolute maxima": (OPS.choose_qparams, torch.rand(3, 1), "token", True, -1, 1),
}


@pytest.mark.parametrize("name", [*NAMES, *NO_OP_CASTS])
def test_no_operator_aliases_or_modifies_an_input(name: str) -> None:
    if name in NO_OP_CASTS:
        function, *args = NO_OP_CASTS[name]
    else:
        function, args = getattr(OPS, name), list(calls()[name])
    inputs = tensors(tuple(args))
    kept = [tensor.clone() for tensor in inputs]
    outputs = tensors(function(*args))
    assert outputs
    owners = [tensor.untyped_storage().data_ptr() for tensor in (*inputs, *outputs)]
    owners = [owner for owner in owners if owner]
    assert len(set(owners)) == len(owners)
    for before, after in zip(kept, inputs, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, calls()[name], test_utils=tests)


# --- values ---------------------------------------------------------------------------------------


@given(seed=SEEDS, rows=st.integers(0, 4), length=st.integers(1, 33))
@settings(deadline=None, max_examples=60)
def test_packing_round_trips(seed: int, rows: int, length: int) -> None:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, length), dtype=torch.int8, generator=g)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, (length + 1) // 2)
    assert torch.equal(OPS.unpack_int4(packed, length), codes)


def test_packing_by_hand() -> None:
    packed = pack_int4(torch.tensor([[1, -1, -8, 7, 5]], dtype=torch.int8))
    assert packed.tolist() == [[0xF1, 0x78, 0x05]]
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
    nibble = [n if n < 8 else n - 16 for n in range(16)]
    wanted = [[nibble[b % 16], nibble[b // 16]] for b in range(256)]
    assert OPS.unpack_int4(every_byte, 2).tolist() == wanted


def test_unpacking_rows_of_a_lookup() -> None:
    codes = int8(7, 9, low=-8, high=7)
    ids = torch.tensor([[3, 0], [6, 3]])
    rows = torch.nn.functional.embedding(ids, pack_int4(codes))
    assert torch.equal(OPS.unpack_int4(rows, 9), codes[ids])


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 64), (2, 0, 64)])
def test_int_gemm_keeps_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, w = int8(*shape), int8(5, 64)
    result = OPS.int_gemm(x, w, 0)
    wanted = np.matmul(x.numpy().astype(np.int64), w.numpy().astype(np.int64).T)
    assert result.dtype == torch.int32
    np.testing.assert_array_equal(result.numpy(), wanted)


def test_int_gemm_of_operands_that_are_not_contiguous() -> None:
    x, w = int8(64, 3, 2).permute(2, 1, 0), int8(64, 5).t()
    wanted = np.matmul(x.numpy().astype(np.int64), w.numpy().astype(np.int64).T)
    np.testing.assert_array_equal(OPS.int_gemm(x, w, CHUNK).numpy(), wanted)


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_choose_qparams_shapes(granularity: str, symmetric: bool) -> None:
    scale, zero_point = OPS.choose_qparams(
        # All positive: the affine zero point is the lowest code, never 0 by chance.
        torch.rand(2, 3, 8) + 1,
        granularity,
        symmetric,
        -127 - (not symmetric),
        127,
    )
    shape = () if granularity == "tensor" else (2, 3, 1)
    assert scale.shape == zero_point.shape == shape
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert bool((zero_point == 0).all()) is symmetric


def test_code_sum_does_not_wrap() -> None:
    codes = torch.full((2, 3000), -128, dtype=torch.int8)
    assert OPS.code_sum(codes).tolist() == [[-128 * 3000]] * 2


def float64_linear(
    x_q: Tensor, z_x: Tensor, w_q: Tensor, z_w: Tensor, s_x: Tensor, s_w: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """sum (x_q - z_x)(w_q - z_w) s_x s_w, and the sum of its terms' magnitudes; all [.., K]."""
    left = (x_q.numpy().astype(float) - z_x.numpy()) * s_x.numpy().astype(float)
    right = (w_q.numpy().astype(float) - z_w.numpy()) * s_w.numpy().astype(float)
    return left @ right.T, np.abs(left) @ np.abs(right).T


@given(
    seed=SEEDS,
    length=st.integers(1, 1500),
    per_token=st.booleans(),
    per_channel=st.booleans(),
    x_affine=st.booleans(),
    w_affine=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_rescale_with_every_correction(
    seed: int, length: int, per_token: bool, per_channel: bool, x_affine: bool, w_affine: bool
) -> None:
    torch.manual_seed(seed)
    x_q, w_q = int8(3, length), int8(4, length)
    s_x = scales(3, 1) if per_token else scales()
    z_x = (int32(3, 1) if per_token else int32()) * x_affine
    s_w = scales(4, 1) if per_channel else scales()
    z_w = (int32(4, 1) if per_channel else int32()) * w_affine
    y = OPS.rescale(
        OPS.int_gemm(x_q, w_q, CHUNK),
        s_x,
        s_w.flatten() if per_channel else s_w,
        z_x if x_affine else None,
        (w_q.int() - z_w).sum(1, dtype=torch.int32) if x_affine else None,
        (z_w.flatten() if per_channel else z_w) if w_affine else None,
        OPS.code_sum(x_q) if w_affine else None,
        None,
    )
    assert y.dtype == torch.float32
    wanted, _ = float64_linear(x_q, z_x, w_q, z_w, s_x, s_w)
    # The int32 sum is exact; its cast and the two products round by 2**-24 each.
    np.testing.assert_allclose(y.numpy(), wanted, rtol=3 * 2**-24, atol=0)


@given(
    seed=SEEDS,
    length=st.integers(1, 90),
    group_size=st.integers(1, 100),
    x_affine=st.booleans(),
    w_affine=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_grouped_gemm_group_by_group(
    seed: int, length: int, group_size: int, x_affine: bool, w_affine: bool
) -> None:
    torch.manual_seed(seed)
    groups = -(-length // group_size)
    x_q, w_q, s_w = int8(2, 3, length), int8(4, length), scales(4, groups)
    z_x, z_w = int32(2, 3, 1) * x_affine, int32(4, groups) * w_affine
    wanted, size = np.zeros((2, 3, 4)), np.zeros((2, 3, 4))
    weight_sum = torch.zeros(4, groups, dtype=torch.int32)
    for g in range(groups):
        part = slice(g * group_size, (g + 1) * group_size)
        column = slice(g, g + 1)
        value, magnitude = float64_linear(
            *(x_q[..., part], z_x, w_q[:, part], z_w[:, column], torch.tensor(1.0), s_w[:, column])
        )
        wanted += value
        size += magnitude
        weight_sum[:, g] = (w_q[:, part].int() - z_w[:, column]).sum(1)
    y = OPS.grouped_gemm(
        *(x_q, w_q, s_w, z_x if x_affine else None, weight_sum if x_affine else None),
        *(z_w if w_affine else None, group_size),
    )
    # Each group's sum is exact, its cast and product round by 2**-24 each, then the fp32 total
    # rounds once a group: all relative to at most the sum of the magnitudes.
    assert (np.abs(y.numpy() - wanted) <= size * (groups + 2) * 2**-24).all()


def test_grouped_gemm_of_groups_longer_than_a_chunk() -> None:
    # 127 * 127 * 1041 is odd and above 2**24: no single fp32 GEMM gives it.
    x, w = (
        torch.full((1, 2082), 127, dtype=torch.int8),
        torch.full((1, 2082), 127, dtype=torch.int8),
    )
    shift = torch.full((1, 2), 127, dtype=torch.int32)
    y = OPS.grouped_gemm(x, w, torch.ones(1, 2), None, None, shift, 1041)
    assert y.item() == 0  # sum x_q w_q - 127 sum x_q: only exact sums cancel


def test_results_follow_the_dtype_of_like() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        args = calls(dtype)
        for name in ("dequantize", "rescale", "add_bias"):
            assert getattr(OPS, name)(*args[name]).dtype == dtype


def test_the_bias_is_added_before_the_cast() -> None:
    y, bias = torch.tensor([2048.75]), torch.tensor([0.5], dtype=torch.float16)
    half = torch.empty(0, dtype=torch.float16)
    # fp16 counts in twos here: cast first, 2048 + 0.5 would be 2048; the sum 2049.25 goes to 2050.
    assert OPS.add_bias(y, bias, half).item() == 2050


# --- seen through by compilers and fake tensors ---------------------------------------------------


def site(x: Tensor, w_q: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor) -> Tensor:
    """A whole quantized linear as convert writes it: per-token affine activations."""
    scale, zero_point = OPS.choose_qparams(x, "token", False, -128, 127)
    x_q = OPS.quantize(x, scale, zero_point, -128, 127, torch.int8)
    acc = OPS.int_gemm(x_q, w_q, CHUNK)
    y = OPS.rescale(acc, scale, w_scale, zero_point, w_sum, None, None, None)
    result: Tensor = OPS.add_bias(y, bias, x)
    return result


def site_inputs() -> tuple[Tensor, ...]:
    w_q = int8(6, 1300)
    return torch.randn(2, 3, 1300), w_q, scales(6), w_q.sum(1, dtype=torch.int32), torch.randn(6)


def targets(gm: GraphModule) -> set[str]:
    """The functions that a graph calls, apart from taking elements out of tuples."""
    called = (node.target for node in gm.graph.nodes if node.op == "call_function")
    return {str(target) for target in called if target is not operator.getitem}


def test_make_fx_sees_aten_only() -> None:
    inputs = site_inputs()
    gm = make_fx(site)(*inputs)
    assert targets(gm)
    assert all(target.startswith("aten.") for target in targets(gm))
    assert torch.equal(gm(*inputs), site(*inputs))


def test_symbolic_trace_keeps_one_node_an_operator() -> None:
    found = targets(torch.fx.symbolic_trace(site))
    wanted = ("choose_qparams", "quantize", "int_gemm", "rescale", "add_bias")
    assert {t.removesuffix(".default") for t in found} == {f"fxquant.{name}" for name in wanted}


@pytest.mark.parametrize(("int8", "product"), [(True, "aten._int_mm"), (False, "aten.mm")])
def test_compiles_without_breaks_and_without_our_operators(
    int8: bool, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if int8 and not cpu_int8.exact_int_mm():
        pytest.skip("this processor has no exact int8 GEMM")
    monkeypatch.setattr(cpu_int8, "exact_int_mm", lambda: int8)
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(site, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    inputs = site_inputs()
    assert torch.equal(compiled(*inputs), site(*inputs))
    assert len(graphs) == 1
    assert f"{product}.default" in targets(graphs[0])
    assert not any("fxquant" in target for target in targets(graphs[0]))


def test_inductor_gives_equal_results() -> None:
    torch._dynamo.reset()
    inputs = site_inputs()
    with torch.no_grad():
        compiled = torch.compile(site, fullgraph=True)(*inputs)
    # Inductor's C++ is built without contraction, so even the fp32 steps are the same.
    torch.testing.assert_close(compiled, site(*inputs), rtol=2**-22, atol=2**-20)


def on_device(values: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    return tuple(
        torch.empty(v.shape, dtype=v.dtype, device=device) if torch.is_tensor(v) else v
        for v in values
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_on_fake_tensors(name: str, device: str, dtype: torch.dtype) -> None:
    args = calls(dtype)[name]
    real = tensors(getattr(OPS, name)(*args))
    with FakeTensorMode():
        fake = tensors(getattr(OPS, name)(*on_device(args, device)))
    for a, b in zip(fake, real, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.device.type == device


TENSOR_ARGUMENTS = [
    (name, place)
    for name, args in calls().items()
    for place, value in enumerate(args)
    # One tensor alone cannot be on two devices, a 0-dim one may; ``like`` gives a dtype only.
    if torch.is_tensor(value) and value.numel() and value.dim() and len(tensors(args)) > 1
]


@pytest.mark.parametrize(("name", "place"), TENSOR_ARGUMENTS)
def test_a_tensor_on_the_wrong_device_is_caught(name: str, place: int) -> None:
    args = calls()[name]
    with FakeTensorMode():
        mixed = list(on_device(args, "cuda"))
        mixed[place] = torch.empty(args[place].shape, dtype=args[place].dtype, device="cpu")
        with pytest.raises(RuntimeError, match=r"two devices|same device"):
            getattr(OPS, name)(*mixed)


def test_int_gemm_on_cuda_is_one_opaque_node() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 16, dtype=torch.int8, device="cuda")
        w = torch.empty(5, 16, dtype=torch.int8, device="cuda")
        gm = make_fx(operators.int_gemm)(x, w, 0)
    assert "fxquant.int_gemm_cuda.default" in targets(gm)
    assert "aten.mm.default" not in targets(gm)


def test_quantize_equals_the_library() -> None:
    # tests/test_quantization.py checks these codes against numpy.
    x, scale, zero_point = torch.randn(4, 16), scales(4, 1), int32(4, 1)
    codes = quantization.encode(x, scale, zero_point, -128, 127)
    assert torch.equal(OPS.quantize(x, scale, zero_point, -128, 127, torch.int8), codes)
