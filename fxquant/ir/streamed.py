"""Leaves whose tensors stay in files: read when asked for, gone when let go.

A streamed module keeps meta tensors where its parameters were, so shapes and dtypes are known to
whoever looks; ``module.weight`` reads the file. Its class is a subclass of the original one, so
that structure-matching passes see what they always see.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fxquant.errors import GraphError, ModelError, WriteError
from fxquant.files.temporary import room_for, temporary_folder
from fxquant.files.tensor_file import TensorFile, storage_order
from fxquant.ir.sources import AnySource, Source

Sources: TypeAlias = dict[str, dict[str, AnySource]]
"""Of each module by its path, and there by the tensor's name."""

_KEPT: Final = "converted leaves of a streamed model are kept there"


class Streamed(nn.Module):
    """Mixin of a module whose tensors in ``_sources`` are read on access."""

    _sources: dict[str, AnySource]
    _held: dict[str, Tensor] | None

    def __getattr__(self, name: str) -> Any:
        source = sources_of(self).get(name)
        if source is None:
            return super().__getattr__(name)
        held = self.__dict__["_held"]
        if held is not None and name in held:
            return held[name]
        value = source.read()
        if name in self.__dict__["_parameters"]:
            value = nn.Parameter(value, requires_grad=False)
        if held is not None:
            held[name] = value
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with held([self]):  # experts look at one tensor as often as there are experts
            return super().__call__(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise ModelError(
            "a streamed model stays on the device and in the dtype that it was opened with: open "
            "it again with others"
        )


@functools.cache
def _streamed_type(base: type[nn.Module]) -> type[Streamed]:
    # The module name tells torch.fx's tracer which classes are torch's own leaves.
    return type(base.__name__, (Streamed, base), {"__module__": base.__module__})


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the mixin where it is streamed."""
    kind = type(module)
    plain: type[nn.Module] = kind.__bases__[1] if issubclass(kind, Streamed) else kind
    return plain


def stream_leaf(module: nn.Module, sources: Mapping[str, AnySource]) -> None:
    """Let ``module`` read these of its parameters and buffers from their sources."""
    known = sources_of(module)
    for name, source in sources.items():
        stand_in = torch.empty(source.shape, dtype=source.dtype, device="meta")
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(stand_in, requires_grad=False)
        else:
            module._buffers[name] = stand_in
    module.__class__ = _streamed_type(plain_type(module))  # type: ignore[arg-type]
    module.__dict__["_sources"] = {**known, **sources}
    module.__dict__["_held"] = None


def sources_of(module: nn.Module) -> dict[str, AnySource]:
    """The module's own streamed tensors by name; what has been replaced since is not among them."""
    found: dict[str, AnySource] = module.__dict__.get("_sources", {})
    values = {**module._parameters, **module._buffers} if found else {}
    return {n: s for n, s in found.items() if (v := values.get(n)) is not None and v.is_meta}


def unstreamed(root: nn.Module) -> Sources:
    """Turn streamed modules below ``root`` into plain ones on meta; their sources by path."""
    found: Sources = {}
    for path, module in root.named_modules():
        if isinstance(module, Streamed):
            found[path] = sources_of(module)
            module.__class__ = plain_type(module)  # type: ignore[assignment]
            module.__dict__.pop("_sources")
            module.__dict__.pop("_held")
    return found


def restream(root: nn.Module, sources: Sources) -> None:
    """Stream what stands on meta below ``root`` again, by path; ModelError if it has no source."""
    for path, module in root.named_modules():
        values = {**module._parameters, **module._buffers}
        on_meta = [name for name, value in values.items() if value is not None and value.is_meta]
        lacking = [name for name in on_meta if name not in sources.get(path, {})]
        if lacking or (on_meta and module is root):
            raise ModelError(f"{path}: {', '.join(lacking or on_meta)} cannot be streamed")
        if on_meta:
            stream_leaf(module, {name: sources[path][name] for name in on_meta})


def streamed_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each streamed tensor below ``root``, read one after the other."""
    for path, module in root.named_modules():
        for name, source in sources_of(module).items():
            yield f"{path}.{name}", source.read()


def streamed_device(root: nn.Module) -> torch.device | None:
    """Where the streamed tensors below ``root`` are read to; None if nothing is streamed."""
    for module in root.modules():
        for source in sources_of(module).values():
            return source.device
    return None


def check_present(gm: nn.Module) -> None:
    """Raise GraphError, naming it, for a tensor without values: on meta, and not streamed."""
    for path, module in gm.named_modules():
        streamed = sources_of(module)
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and value.is_meta and name not in streamed:
                raise GraphError(
                    f"{f'{path}.{name}'.lstrip('.')} of the graph is on device meta, so it holds "
                    "no values: load or trace the graph on a device that computes"
                )


@contextlib.contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, what is read from these modules stays until the end of the block."""
    streamed = [m for m in modules if isinstance(m, Streamed) and m.__dict__["_held"] is None]
    for module in streamed:
        module.__dict__["_held"] = {}
    try:
        yield
    finally:
        for module in streamed:
            module.__dict__["_held"] = None


def workspace_folder() -> contextlib.AbstractContextManager[Path]:
    """A folder for a Workspace, gone with the block; WriteError where none can be made."""
    return temporary_folder(_KEPT)


@dataclass
class Workspace:
    """A folder that new leaves of a graph are written to as soon as they are installed.

    Tensors of at least ``smallest`` bytes go to one safetensors file a leaf; scales, biases and
    the like stay in memory. Raises WriteError where one cannot be written.
    """

    directory: Path
    smallest: int = 2**16
    written: int = field(default=0, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return self  # copies of a graph share the folder, and each file is written once

    def keep(self, module: nn.Module) -> None:
        """Write the large tensors of ``module`` and of its children, and stream them."""
        for part in module.modules():
            values = {**part._parameters, **part._buffers}
            large = {
                name: value.detach()
                for name, value in values.items()
                if value is not None
                and not value.is_meta
                and value.numel() * value.element_size() >= self.smallest
            }
            if large:
                self._write(part, large)

    def _write(self, part: nn.Module, large: dict[str, Tensor]) -> None:
        path = self.directory / f"leaf-{self.written:06}.safetensors"
        self.written += 1
        orders = {name: storage_order(value) for name, value in large.items()}
        stored = {n: v.permute(orders[n]).contiguous() for n, v in large.items()}
        try:
            with room_for(path, _KEPT):
                save_file(stored, path)
        except WriteError:
            path.unlink(missing_ok=True)
            raise
        file = TensorFile.open(path)
        stream_leaf(
            part,
            {n: Source(file, n, v.dtype, v.device, orders[n]) for n, v in large.items()},
        )
