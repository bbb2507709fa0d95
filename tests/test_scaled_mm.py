"""Level kernels-inexact: FP8 products by torch._scaled_mm, held to a bound and never said exact."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

import fxquant
from fxquant.errors import CheckpointError, VerificationError
from fxquant.formats.floating import E4M3
from fxquant.ir import fused
from fxquant.ir.graph import Level, info, is_op
from fxquant.ir.legal_forms import OPS, verify
from fxquant.numerics.kernels import scaled_mm, table
from fxquant.numerics.kernels.scaled_mm import Kind
from fxquant.passes import FuseFp8, FuseKernels
from tests.architectures import llama, opt, token_ids
from tests.fused_calls import BRAIN, DTYPES, HALF, SINGLE, same
from tests.test_cuda_fake import NoGuards, fake_cuda, run_fake

CPU = torch.device("cpu")
TAKEN = ("fp8", "fp8-static", "we4m3-tensor/ae4m3-dynamic", "we4m3/ae4m3-static:p99")
GRIDS = ("e4m3", "e4m3")
MODELS = {"llama": llama, "opt": opt}
composed = fused.code_linear  # the reference


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """First tests are remembered for a process."""
    scaled_mm._beyond.cache_clear()
    yield
    scaled_mm._beyond.cache_clear()


def operands(
    seed: int,
    dtype: torch.dtype,
    *,
    lead: tuple[int, ...] = (2, 5),
    sizes: tuple[int, int] = (64, 48),
    single: tuple[bool, bool] = (False, False),
    bias: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Of code_linear: numbers of all magnitudes, one column far above the others."""
    generator = torch.Generator().manual_seed(seed)
    length, columns = sizes

    def codes(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) * 20
        values[..., 3] *= 12
        return E4M3.encode(E4M3.nearest_(values))

    def scale(one: bool, *shape: int) -> Tensor:
        return torch.rand(() if one else shape, generator=generator) * 0.01 + 1e-3

    like = torch.randn(*lead, length, generator=generator).to(dtype)
    like.view(-1, length)[1, 2] = torch.nan
    scales = scale(single[0], *lead, 1), scale(single[1], columns, 1)
    added = None if bias is None else torch.randn(columns, generator=generator).to(bias)
    return (codes(*lead, length), codes(columns, length), *scales, added, like, *GRIDS)


def exact(
    x: Tensor, w: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the magnitudes of what is added in it."""
    sizes = left.double() * right.double().flatten()
    wanted = x.double() @ w.double().t() * sizes
    magnitude = x.double().abs() @ w.double().abs().t() * sizes
    return (wanted if bias is None else wanted + bias.double()), magnitude


SINGLES = [(False, False), (True, True), (True, False), (False, True)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("single", SINGLES)
@pytest.mark.parametrize("lead", [(2, 5), (2,), (1, 2, 17)])
def test_numbers_lie_within_the_derived_bound(
    dtype: torch.dtype, single: tuple[bool, bool], lead: tuple[int, ...]
) -> None:
    """Of float64, through the CPU's implementation, with each bias; the reference's NaN rows."""
    for seed, bias in enumerate((None, dtype, SINGLE)):
        call = operands(seed, dtype, lead=lead, single=single, bias=bias)
        assert not scaled_mm.without_scaled_mm(*call)
        found, reference = OPS.code_linear(*call), composed(*call)
        assert found.dtype == dtype
        assert found.shape == reference.shape == (*lead, 48)
        nan = reference.isnan()
        assert torch.equal(found.isnan(), nan)
        assert int(nan.sum()) == 48
        wanted, magnitude = exact(*call)
        bound = scaled_mm.allowed(magnitude, call[4], dtype, 64, "cpu")
        for each in (found, reference):
            assert bool(((each.double() - wanted).abs() <= bound)[~nan].all())


def test_the_bound_is_one_that_mistakes_exceed() -> None:
    """It grows with K as sums do; what is wrong by a code, a scale or a column lies beyond it."""
    call = operands(3, SINGLE)
    wanted, magnitude = exact(*call)
    good = ~torch.isnan(composed(*call))
    for device, largest in (("cpu", 1e-5), ("cuda", 0.0162)):
        bound = scaled_mm.allowed(magnitude, None, SINGLE, 64, device)
        assert float((bound / magnitude).max()) < largest
        for wrong in (wanted * 1.5, wanted.roll(1, -1), wanted.roll(1, 1), -wanted):
            assert not bool(((wrong - wanted).abs() <= bound)[good].all())
    longer = scaled_mm.allowed(magnitude, None, SINGLE, 2**16, "cuda")
    assert bool((longer > bound).all())


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [16, 160, 2048])
def test_the_cpus_keeps_to_its_bound(dtype: torch.dtype, single: bool, length: int) -> None:
    for biased in (False, True):
        assert scaled_mm._keeps(Kind(dtype, length, single, biased), CPU)


def plant(monkeypatch: pytest.MonkeyPatch, mistake: Any) -> None:
    real = torch._scaled_mm

    def wrong(a: Tensor, b: Tensor, one: Tensor, other: Tensor, **rest: Any) -> Tensor:
        result: Tensor = mistake(real, a, b, one, other, **rest)
        return result

    monkeypatch.setattr(torch, "_scaled_mm", wrong)


def unscaled(real: Any, a: Tensor, b: Tensor, one: Tensor, other: Tensor, **rest: Any) -> Any:
    return real(a, b, torch.ones_like(one), other, **rest)


def shifted(real: Any, *call: Any, **rest: Any) -> Any:
    return real(*call, **rest).roll(1, 1)


def without_last(real: Any, a: Tensor, b: Tensor, *scales: Any, **rest: Any) -> Any:
    """One code of K is left out, as at the end of a tile."""
    a = a.clone()
    a.view(torch.uint8)[:, -16:] = 0
    return real(a, b, *scales, **rest)


def fails(real: Any, *call: Any, **rest: Any) -> Any:
    raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")


@pytest.mark.parametrize(("dtype", "mistake", "said"), [
    (BRAIN, unscaled, "further off than its bound"),
    (HALF, shifted, "further off than its bound"),
    (SINGLE, without_last, "further off than its bound"),
    (BRAIN, fails, "does not run here: RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"),
])  # fmt: skip
def test_a_wrong_one_falls_back_with_a_note(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mistake: Any, said: str
) -> None:
    plant(monkeypatch, mistake)
    call = operands(5, dtype)
    with pytest.warns(RuntimeWarning, match=f"{said}.*the reference runs instead, slower and ex"):
        found = OPS.code_linear(*call)
    assert same(found, composed(*call))
    ((name, why),) = table.reasons("code_linear", *call)
    assert name == "torch._scaled_mm"
    assert said in why
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert same(OPS.code_linear(*call), found)


REFUSED = {
    "K": ((40, 48), 3, r"a weight \[48, 40\], and .* multiples of 16"),
    "N": ((64, 20), 3, r"a weight \[20, 64\], and .* multiples of 16"),
    "rows": ((64, 48), 0, "nothing to compute"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_layouts_that_are_refused_say_why_and_run_as_the_reference(what: str) -> None:
    sizes, rows, said = REFUSED[what]
    codes, weight, scale, *rest, like = operands(7, BRAIN, lead=(3, 4), sizes=sizes)[:6]
    call = (codes[:rows], weight, scale[:rows], *rest, like[:rows], *GRIDS)
    assert re.search(said, scaled_mm.without_scaled_mm(*call))
    assert same(OPS.code_linear(*call), composed(*call))


def test_grids_dtypes_and_scales_that_are_refused() -> None:
    call = operands(8, SINGLE)
    for grids in (("e5m2", "e5m2"), ("e4m3", "e5m2"), ("e4m3", "int8")):
        other = (*call[:6], *grids)
        why = scaled_mm.without_scaled_mm(*other)
        assert why.startswith(f"{grids[0]} by {grids[1]}, and ")
    double = (*call[:5], call[5].double(), *GRIDS)
    assert scaled_mm.without_scaled_mm(*double) == "no result in torch.float64"
    short = (*call[:3], call[3][1:], *call[4:])
    assert "neither one for all" in scaled_mm.without_scaled_mm(*short)


def test_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=found: found)
        why = scaled_mm._without_device.__wrapped__(torch.device("cuda"))
        assert bool(why) == (found < (8, 9))
        assert not why or why == f"compute capability {found[0]}.{found[1]}, and 8.9 is needed"


@functools.cache
def exact_graph(name: str, scheme: str, dtype: torch.dtype) -> GraphModule:
    """At level kernels; the sizes of every linear are multiples of 16."""
    model = MODELS[name]().to(dtype)
    return fxquant.convert(model, scheme, calibration=[token_ids(2, 12, seed=5)], level="kernels")


def count(graph: GraphModule, target: Any) -> int:
    return sum(is_op(node, target.default) for node in graph.graph.nodes)


BUILT = (("llama", SINGLE), ("opt", HALF), ("llama", BRAIN))
CASES = [  # of each scheme one, the others slow
    pytest.param(*(name, scheme, dtype), marks=() if at == each % len(BUILT) else pytest.mark.slow)
    for each, scheme in enumerate(TAKEN)
    for at, (name, dtype) in enumerate(BUILT)
]


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_a_graph_takes_it_and_is_equivalent(name: str, scheme: str, dtype: torch.dtype) -> None:
    plain = exact_graph(name, scheme, dtype)
    fast = FuseFp8()(plain)
    assert (info(plain).level, info(fast).level) == (Level.KERNELS, Level.INEXACT)
    linears = [site.path for site in info(fast).sites if site.role == "linear"]
    assert count(fast, OPS.code_linear) == len(linears) == count(plain, OPS.code_gemm)
    assert count(fast, OPS.rescale) == count(fast, OPS.code_gemm) == 0
    last = info(fast).history[-1]
    assert last.name == "fuse_fp8"
    assert last.difference is not None
    assert last.difference <= FuseFp8().tolerance(dtype)
    ids = token_ids(2, 9)
    with torch.no_grad():
        found, wanted = fast(ids).double(), plain(ids).double()
        effect = wanted - fxquant.trace(MODELS[name]().to(dtype))(ids)
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) < float(effect.norm())
    notes = {note.site: note.text for note in info(fast).notes if "fuse" in note.origin}
    assert set(notes) == set(linears)
    assert all(text.endswith("not exact") for text in notes.values())
    assert "not exact" in str(fxquant.inspect(fast))
    assert "e4m3 by e4m3" in fxquant.inspect(fast).layer(0)


@pytest.mark.parametrize(("scheme", "said"), [
    ("mxfp8", "scales of groups"),
    ("nvfp4", "scales of groups"),
    ("we5m2/ae5m2-dynamic", "e5m2 by e5m2"),
    ("w8/ae4m3-dynamic-token", "e4m3 by int8"),
    ("we4m3-g16/ae4m3-dynamic-token", "scales of groups"),
])  # fmt: skip
def test_sites_that_no_device_takes_stay_exact_and_say_why(scheme: str, said: str) -> None:
    plain = exact_graph("llama", scheme, SINGLE)
    fast = FuseFp8()(plain)
    assert count(fast, OPS.code_linear) == 0
    assert info(fast).history[-1].difference == 0
    texts = [note.text for note in info(fast).notes if note.origin == "fuse_fp8"]
    assert texts
    assert all(text.startswith(f"stays as at level integer: {said}") for text in texts)
    with torch.no_grad():
        assert same(fast(token_ids(2, 9)), plain(token_ids(2, 9)))


def test_sizes_that_no_device_takes_are_noted_by_site() -> None:
    model = llama(intermediate_size=40)
    fast = fxquant.convert(model, "fp8", level="kernels-inexact")
    notes = {note.site.split(".")[-1]: note.text for note in info(fast).notes}
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert "multiples of 16" in notes[name]
    assert notes["q_proj"].endswith("not exact")


def test_integers_and_floats_are_what_they_were() -> None:
    for scheme in ("w8a8-dynamic-token", "w4-g16"):
        plain = exact_graph("llama", scheme, SINGLE)
        fast = FuseFp8()(plain)
        assert not [note for note in info(fast).notes if note.origin == "fuse_fp8"]
        with torch.no_grad():
            assert same(fast(token_ids(2, 9)), plain(token_ids(2, 9)))
    assert info(fxquant.convert(llama(), "fp", level="kernels-inexact")).level == Level.FLOAT


def test_attentions_products_stay() -> None:
    fast = FuseFp8()(exact_graph("llama", "fp8+attn8(format=fp8)", SINGLE))
    notes = {note.site: note.text for note in info(fast).notes if note.origin == "fuse_fp8"}
    products = [site.path for site in info(fast).sites if site.role == "matmul"]
    assert products
    assert all("two activations" in notes[path] for path in products)


def test_the_level_is_asked_for_said_and_not_saved(tmp_path: Any) -> None:
    graph, ids = fxquant.convert(llama(), "fp8"), token_ids(2, 9)
    assert fxquant.evaluate(graph, ids).level == "integer"
    found = fxquant.evaluate(graph, ids, level="kernels-inexact")
    assert found.level == "kernels-inexact"
    assert "on cpu at level kernels-inexact (" in str(found)
    fast = FuseFp8()(FuseKernels()(graph))
    with pytest.raises(CheckpointError, match=r"level kernels-inexact is not saved: .*FuseFp8\(\)"):
        fxquant.save(fast, tmp_path / "fast")
    with pytest.raises(VerificationError, match="pass fuse_fp8 needs level kernels"):
        FuseFp8()(graph)
    fxquant.ir.graph.update_info(fast, level=Level.KERNELS)
    with pytest.raises(VerificationError, match="code_linear may not stand at level kernels"):
        verify(fast, "a test")


def test_a_compiler_sees_the_reference() -> None:
    plain = fxquant.convert(llama(num_hidden_layers=1), "fp8")
    fast = FuseFp8()(FuseKernels()(plain))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert same(compiled(token_ids(2, 9)), plain(token_ids(2, 9)))


def test_rows_that_are_not_exact_say_so() -> None:
    assert {row.operator for row in table.TABLE if not row.exact} == {"code_linear"}
    assert {row.device for row in table.TABLE if not row.exact} == {"cpu", "cuda"}


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_graphs_run_on_fake_cuda(name: str, scheme: str, dtype: torch.dtype) -> None:
    gm, mode = FuseFp8()(exact_graph(name, scheme, dtype)), FakeTensorMode()
    logits = run_fake(fake_cuda(gm, mode), mode)
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", dtype, (2, 10, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("single", SINGLES)
def test_torch_takes_the_layout_on_cuda(dtype: torch.dtype, single: tuple[bool, bool]) -> None:
    """By torch's own checks of strides, sizes and scales, of a call as CUDA would get it."""
    for bias in (None, dtype, SINGLE):
        for lead in ((2, 5), (2,), (1, 2, 17)):
            call = operands(1, dtype, lead=lead, single=single, bias=bias)
            with FakeTensorMode(), NoGuards():
                there: list[Any] = [
                    torch.empty(each.shape, dtype=each.dtype, device="cuda")
                    if isinstance(each, Tensor)
                    else each
                    for each in call
                ]
                found = scaled_mm.code_linear(*there)
            assert (found.device.type, found.dtype, found.shape) == ("cuda", dtype, (*lead, 48))
    with FakeTensorMode(), NoGuards():
        x, w = (torch.empty(n, 40, dtype=torch.float8_e4m3fn, device="cuda") for n in (5, 48))
        one = torch.ones((), device="cuda")
        with pytest.raises(RuntimeError, match="divisible by 16"):
            torch._scaled_mm(x, w.t(), one, one, out_dtype=BRAIN)
