"""CUDA without a GPU: every scheme's graph runs on fake CUDA tensors, which catch mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import fxquant
from fxquant.errors import GraphCallError
from fxquant.ir import grid_operators, operators
from fxquant.ir.graph import clone_sharing_storage
from fxquant.numerics import gemm
from tests.architectures import ARCHITECTURES, gpt2, llama, opt, token_ids
from tests.test_conversion import ACTIVATION_SCHEMES, ESTIMATED, FEW, WEIGHT_SCHEMES, calibration

SCHEMES = ["fp", "fp32-gemm", *WEIGHT_SCHEMES, *ACTIVATION_SCHEMES]
GRAPHS = [scheme for scheme in SCHEMES if scheme not in ESTIMATED]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = [("opt", scheme, dtype) for scheme in GRAPHS for dtype in (HALF, BRAIN)]
CASES += [("gpt2", scheme, HALF) for scheme in ("fp", "fp32-gemm", *FEW)]
CASES += [("llama", scheme, dtype) for scheme in FEW for dtype in (BRAIN, SINGLE)]
OF_OTHER_GRIDS = ("fp8", "fp8-static", "mxfp6", "nvfp4", "wmxfp4", "wnf4-g16/a8-dynamic-g8")
CASES += [("llama", scheme, BRAIN) for scheme in OF_OTHER_GRIDS]
CASES += [("opt", "nvfp4", HALF), ("llama", "fp8", SINGLE)]
ONE_LAYER: dict[str, Callable[[], PreTrainedModel]] = {
    "opt": functools.partial(opt, num_hidden_layers=1),
    "gpt2": functools.partial(gpt2, n_layer=1),
    "llama": functools.partial(llama, num_hidden_layers=1),
}
real_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@functools.cache
def traced(name: str, dtype: torch.dtype) -> GraphModule:
    return fxquant.trace(ONE_LAYER[name]().to(dtype))


@functools.cache
def converted(name: str, scheme: str, dtype: torch.dtype) -> GraphModule:
    return fxquant.convert(traced(name, dtype), scheme, calibration=calibration())


def fake_cuda(gm: GraphModule, mode: FakeTensorMode, left: str | None = None) -> GraphModule:
    """A copy whose parameters and buffers are fake CUDA tensors; ``left`` stays on a fake CPU."""
    copy = clone_sharing_storage(gm)
    with mode:
        for path, module in copy.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        device = "cpu" if f"{path}.{name}" == left else "cuda"
                        fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                        parameter = isinstance(value, torch.nn.Parameter)
                        tensors[name] = torch.nn.Parameter(fake, False) if parameter else fake
    return copy


def view(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` of None, slices, integers, tensors and ``...``, by operators."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    for at in dots:
        named = sum(part is not None and part is not Ellipsis for part in parts)
        parts[at : at + 1] = [slice(None)] * (x.dim() - named)
    dim, chosen = 0, {}
    for part in parts:
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if isinstance(part, Tensor):
            chosen[dim] = part
            dim += 1
            continue
        assert part is None or isinstance(part, slice)
        if part is None:
            x = x.unsqueeze(dim)
        else:
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        dim += 1
    if chosen:
        x = torch.ops.aten.index.Tensor(x, [chosen.get(at) for at in range(max(chosen) + 1)])
    return x


class NoGuards(TorchFunctionMode):
    """A few Tensor methods ask for a real CUDA before they dispatch, which a CPU-only torch lacks.

    Here the operators behind them are called, which do not ask. fxquant's composite operators are
    entered, so that this holds inside them too.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return view(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_(view(*args[:2]), args[2])
        if func is Tensor.contiguous:
            return torch.ops.aten.contiguous(*args)
        name = getattr(func, "_qualified_op_name", "")
        functions = {**vars(operators), **vars(grid_operators)}
        inner = functions.get(name.removeprefix("fxquant::").partition(".")[0])
        if name.startswith("fxquant::") and inner is not None:
            with self:
                return inner(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def run_fake(gm: GraphModule, mode: FakeTensorMode, mask: bool = False) -> Tensor:
    with mode, NoGuards():
        ids = torch.zeros(2, 10, dtype=torch.int64, device="cuda")
        logits = gm(ids, torch.ones_like(ids)) if mask else gm(ids)
    assert isinstance(logits, Tensor)
    return logits


@pytest.mark.parametrize(
    "index",
    [
        2,
        None,
        slice(1, 3),
        (slice(None), None, slice(None, None, 2)),
        (..., -1),
        (None, ..., slice(-2, None)),
        (0, ..., None),
    ],
)
def test_brackets_by_operators(index: Any) -> None:
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(x, index), x[index])


@pytest.mark.parametrize(("name", "scheme", "dtype"), CASES)
def test_every_scheme_runs_on_cuda(name: str, scheme: str, dtype: torch.dtype) -> None:
    gm, mode = converted(name, scheme, dtype), FakeTensorMode()
    logits = run_fake(fake_cuda(gm, mode), mode)
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", dtype, (2, 10, 128))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_on_cuda(name: str) -> None:
    model = ARCHITECTURES[name]().half()
    gm, mode = fxquant.trace(model), FakeTensorMode()
    logits = run_fake(fake_cuda(gm, mode), mode, mask=True)
    # GPT-J of transformers 4 gives float32 logits whatever its dtype.
    with torch.no_grad():
        expected = model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.dtype
    assert (logits.device.type, logits.dtype) == ("cuda", expected)


PLANTED = {
    "w8": ("weight", "weight_scale", "bias"),
    "w8a8-dynamic-token": ("weight", "weight_scale", "bias"),
    "w8-asym/a8-static-asym:absmax": ("weight", "weight_scale", "weight_zero_point", "weight_sum"),
    "w4-g12-asym/a8-static-asym:absmax": ("weight", "weight_scale", "weight_sum"),
}
MISTAKES = [(scheme, name) for scheme, names in PLANTED.items() for name in names]


@pytest.mark.parametrize(("scheme", "name"), MISTAKES)
def test_a_buffer_left_on_the_cpu_is_caught(scheme: str, name: str) -> None:
    """Not 0-dim ones: CUDA kernels take those from the CPU."""
    gm, mode = converted("opt", scheme, torch.float16), FakeTensorMode()
    planted = fake_cuda(gm, mode, left=f"model.decoder.layers.0.fc1.{name}")
    refused = (RuntimeError, GraphCallError)
    with pytest.raises(refused, match=r"[Tt]wo devices|different devices|same device"):
        run_fake(planted, mode)


def test_a_constant_made_on_the_cpu_is_caught() -> None:
    """torch.arange without a device, beside CUDA tensors."""
    gm, mode = converted("opt", "w8a8-dynamic", torch.float16), FakeTensorMode()
    planted = fake_cuda(gm, mode)
    norm = next(n for n in planted.graph.nodes if str(n.target).endswith("0.final_layer_norm"))
    with planted.graph.inserting_after(norm):
        columns = planted.graph.call_function(torch.arange, (32,))
    with planted.graph.inserting_after(columns):
        added = planted.graph.call_function(torch.add, (norm, columns))
    norm.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    planted.recompile()
    with pytest.raises(RuntimeError, match="two devices"):
        run_fake(planted, mode)


def test_the_cuda_route_is_taken() -> None:
    """int8 codes go to the opaque CUDA kernel at each of the six linears, not through fp32."""
    gm, mode = converted("opt", "w8a8-dynamic", torch.float16), FakeTensorMode()
    calls: list[str] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    planted = fake_cuda(gm, mode)
    with Counter():  # type: ignore[no-untyped-call]
        run_fake(planted, mode)
    assert calls.count("fxquant.int_gemm_cuda.default") == 6


WRONG = {
    "length": ((64, 16), torch.int8, "cuda"),
    "device": ((64, 32), torch.int8, "cpu"),
    "dtype": ((64, 32), torch.float16, "cuda"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_fake_kernel_asks_for_what_the_real_one_needs(what: str) -> None:
    shape, dtype, device = WRONG[what]
    with FakeTensorMode():
        rows = torch.empty(17, 32, dtype=torch.int8, device="cuda")
        weight = torch.empty(shape, dtype=dtype, device=device)
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.fxquant.int_gemm_cuda(rows, weight, 0)


def codes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


@real_cuda
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("rows", "length", "columns"),
    [(32, 64, 128), (17, 2048, 8), (1, 4096, 16), (5, 37, 11), (0, 8, 8)],
)
def test_int_gemm_on_cuda(rows: int, length: int, columns: int) -> None:
    x, w = codes(rows, length), codes(columns, length)
    chunk = gemm.certified_chunk(w, 128)
    found = torch.ops.fxquant.int_gemm(x.cuda(), w.cuda(), chunk)
    assert found.dtype == torch.int32
    assert torch.equal(found.cpu().to(torch.int64), gemm.reference_int_gemm(x, w))


@real_cuda
@pytest.mark.cuda
@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8", "w8a8-dynamic-token", "w8a8-static-asym:absmax"])
@pytest.mark.parametrize("build", [opt, gpt2, llama])
def test_converting_on_cuda(build: Callable[[], PreTrainedModel], scheme: str) -> None:
    """In float32 the devices differ by summation order, which may round a few codes anew."""
    ids = token_ids(3, 17)
    there = fxquant.convert(build().cuda(), scheme, calibration=calibration())(ids.cuda())
    here = fxquant.convert(build(), scheme, calibration=calibration())(ids)
    effect = float((here - fxquant.trace(build())(ids)).norm())
    assert there.is_cuda
    assert float((there.cpu() - here).norm()) <= 0.2 * effect
