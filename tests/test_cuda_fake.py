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

import fxquant
from fxquant import gemm
from fxquant.graph import clone_sharing_storage, is_op
from fxquant.levels import OPS
from tests.architectures import ARCHITECTURES, gpt2, llama, opt, token_ids
from tests.test_conversion import ACTIVATION_SCHEMES, WEIGHT_SCHEMES, calibration

SCHEMES = ["fp", "fp32-gemm", *WEIGHT_SCHEMES, *ACTIVATION_SCHEMES]
MODELS = {"opt": opt, "gpt2": gpt2, "llama": llama}
real_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@functools.cache
def traced(name: str, dtype: torch.dtype) -> GraphModule:
    return fxquant.trace(ARCHITECTURES[name]().to(dtype))


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
                        tensors[name] = torch.nn.Parameter(fake, False) if parameter else fake  # type: ignore[assignment]
    return copy


def view(x: Tensor, index: Any) -> Tensor:
    """``x[index]`` of None, slices, integers and ``...``, by operators."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        named = sum(part is not None and part is not Ellipsis for part in parts)
        parts[at : at + 1] = [slice(None)] * (x.dim() - named)
    dim = 0
    for part in parts:
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        assert part is None or isinstance(part, slice)
        if part is None:
            x = x.unsqueeze(dim)
        else:
            x = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1)
        dim += 1
    return x


class Brackets(TorchFunctionMode):
    """Brackets on a fake CUDA tensor ask for a real CUDA, which a CPU-only torch lacks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return view(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_(view(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def run_fake(gm: GraphModule, mode: FakeTensorMode, mask: bool = False) -> Tensor:
    with mode, Brackets():
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_runs_on_cuda(name: str, scheme: str, dtype: torch.dtype) -> None:
    gm, mode = converted(name, scheme, dtype), FakeTensorMode()
    logits = run_fake(fake_cuda(gm, mode), mode)
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", dtype, (2, 10, 128))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_on_cuda(name: str) -> None:
    mode = FakeTensorMode()
    logits = run_fake(fake_cuda(traced(name, torch.float16), mode), mode, mask=True)
    assert (logits.device.type, logits.dtype) == ("cuda", torch.float16)


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
    with pytest.raises(RuntimeError, match=r"[Tt]wo devices|different devices|same device"):
        run_fake(planted, mode)


def test_a_constant_made_on_the_cpu_is_caught() -> None:
    """torch.arange without a device, beside CUDA tensors."""
    gm, mode = converted("opt", "w8a8-dynamic", torch.float16), FakeTensorMode()
    planted = fake_cuda(gm, mode)
    acc = next(n for n in planted.graph.nodes if is_op(n, OPS.int_gemm.default))
    columns = planted.get_submodule(str(acc.args[1].target).rpartition(".")[0]).weight.shape[0]
    with planted.graph.inserting_after(acc):
        added = planted.graph.call_function(torch.add, (acc, acc))
        acc.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        with planted.graph.inserting_before(added):
            added.args = (acc, planted.graph.call_function(torch.arange, (columns,)))
    planted.recompile()
    with pytest.raises(RuntimeError, match="two devices"):
        run_fake(planted, mode)


@pytest.mark.parametrize(
    ("rows", "weight", "error"),
    [
        ((17, 32), (64, 16), "wrong length"),
        ((17, 32), (64, 32), "wrong device"),
        ((17, 32), (64, 32), "wrong dtype"),
    ],
)
def test_the_fake_kernel_checks_what_the_real_one_needs(
    rows: tuple[int, int], weight: tuple[int, int], error: str
) -> None:
    dtype = torch.float16 if error == "wrong dtype" else torch.int8
    device = "cpu" if error == "wrong device" else "cuda"
    with FakeTensorMode():
        x = torch.empty(rows, dtype=torch.int8, device="cuda")
        w = torch.empty(weight, dtype=dtype, device=device)
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.fxquant.int_gemm(x, w, 0)


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
def test_converting_on_cuda(build: Callable[[], torch.nn.Module], scheme: str) -> None:
    """In float32 the devices differ by summation order, which may round a few codes anew."""
    ids = token_ids(3, 17)
    there = fxquant.convert(build().cuda(), scheme, calibration=calibration())(ids.cuda())  # type: ignore[arg-type]
    here = fxquant.convert(build(), scheme, calibration=calibration())(ids)  # type: ignore[arg-type]
    effect = float((here - fxquant.trace(build())(ids)).norm())  # type: ignore[arg-type]
    assert there.is_cuda
    assert float((there.cpu() - here).norm()) <= 0.2 * effect
