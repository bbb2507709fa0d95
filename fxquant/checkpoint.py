"""Save a graph to a folder and load it without the float model.

manifest.json              format version, checksums
graph.json                 nodes, modules, GraphInfo (scheme, sites, history)
weights-*.safetensors      codes, scales and what stayed float
config.json, tokenizer     as the Hugging Face model has them
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.certificate import check_chunks
from fxquant.dataclass_json import from_json, to_json
from fxquant.errors import CheckpointError, FxquantError
from fxquant.graph import GraphInfo, info, set_info
from fxquant.graph_json import decode_nodes, encode_node
from fxquant.levels import verify
from fxquant.manifest import check_manifest, is_checkpoint, write_manifest
from fxquant.module_json import NONE, decode_module, encode_module, register_tensors
from fxquant.streamed import Source, sources_of, stream_leaf
from fxquant.target import saving
from fxquant.tensor_file import TensorFile, storage_order

GRAPH, CONFIG = "graph.json", "config.json"


def save(
    gm: GraphModule, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None
) -> None:
    """Write ``gm`` (level float, qdq or integer) to ``directory``, whole or not at all.

    Tied tensors are written once. An earlier checkpoint there is replaced; any other folder with
    something in it is not. A streamed graph is written block by block.

    Raises CheckpointError before anything is written: a node or module that the format does not
    know (named, with its target), a folder that is in use or cannot be written; and where writing
    fails (a full disk), which leaves nothing behind.
    """
    target = Path(directory)
    check_target(target)
    with saving(target):
        _save(gm, target, tokenizer)


def _save(gm: GraphModule, target: Path, tokenizer: Tokenizer | None) -> None:
    tensors = _Tensors(gm)
    text = json.dumps(_encode_graph(gm, tensors), separators=(",", ":"))
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        (partial / GRAPH).write_text(text, encoding="utf-8")
        for number, group in enumerate(tensors.by_block(info(gm).blocks)):
            save_file(group, partial / f"weights-{number:05}.safetensors")
        if info(gm).config:
            (partial / CONFIG).write_text(info(gm).config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_manifest(partial)
        _put_in_place(partial, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:  # Ctrl-C too must not leave half a checkpoint behind
        shutil.rmtree(partial, ignore_errors=True)


def check_target(directory: Path) -> None:
    """Make the parent folder; raise CheckpointError where ``save`` could not write there or would
    replace what is no checkpoint."""
    if directory.exists() and not (is_checkpoint(directory) or _is_empty(directory)):
        raise CheckpointError(
            f"{directory} exists and is not a checkpoint of fxquant; give another folder"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory.parent):
            pass
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}: {error}; give another folder") from error


def load(
    directory: str | os.PathLike[str], device: str | torch.device = "cpu", *, stream: bool = False
) -> GraphModule:
    """The graph that ``save`` wrote, on ``device``, bit for bit; no float model is needed.

    ``stream``: tensors of matrices stay in the files and are read when a node needs them.

    Raises CheckpointError for a folder that is damaged, truncated, foreign or of a newer format
    version, and for a graph that contains anything but the listed operations.
    """
    source = Path(directory)
    files = check_manifest(source)
    try:
        data = json.loads((source / GRAPH).read_text(encoding="utf-8"))
        # Checked on the CPU, then moved as a whole; streamed tensors are read to the device.
        first = torch.device(device if stream else "cpu")
        gm = _decode_graph(data, _Files(source, files, data, first, stream))
        check_chunks(gm)
        verify(gm, f"load of {source}")
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    except (FxquantError, *_MALFORMED) as error:
        raise CheckpointError(
            f"{source}: {GRAPH} does not describe a valid graph: {type(error).__name__}: {error}"
        ) from error
    gm.recompile()
    return gm if stream else gm.to(device)


# What well-typed code raises when the JSON has another shape than `save` writes.
_MALFORMED = (
    *(KeyError, TypeError, ValueError, AttributeError, IndexError),
    *(RuntimeError, OSError, SyntaxError),
)


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _put_in_place(partial: Path, target: Path) -> None:
    partial.chmod(0o755)  # mkdtemp's is private
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        partial.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


class _Tensors:
    """Every tensor of a graph under one key; ``ties`` maps further names to keys."""

    def __init__(self, gm: GraphModule) -> None:
        self.owners: dict[str, tuple[nn.Module, str]] = {}
        self.ties: dict[str, str] = {}
        self.orders: dict[str, list[int]] = {}
        seen: dict[Any, str] = {}
        for path, module in gm.named_modules(remove_duplicate=False):
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                if value is None:
                    continue
                key = f"{path}.{name}" if path else name
                first = seen.setdefault(_identity(module, name, value), key)
                if first != key:
                    self.ties[key] = first
                    continue
                self.owners[key] = (module, name)
                source = sources_of(module).get(name)
                order = storage_order(value) if source is None else source.order
                if order is not None and order != tuple(range(value.dim())):
                    self.orders[key] = list(order)

    def by_block(self, blocks: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
        """What one file holds: the tensors of each block, then the others."""
        rest = dict.fromkeys(self.owners)
        for block in blocks:
            names = [key for key in rest if key.startswith(f"{block}.")]
            for key in names:
                del rest[key]
            if names:
                yield {key: self._stored(key) for key in names}
        if rest:
            yield {key: self._stored(key) for key in rest}

    def _stored(self, key: str) -> Tensor:
        module, name = self.owners[key]
        value: Tensor = getattr(module, name).detach()
        return value.permute(self.orders.get(key, list(range(value.dim())))).contiguous().cpu()


def _identity(module: nn.Module, name: str, value: Tensor) -> Any:
    source = sources_of(module).get(name)
    if source is not None:
        return (str(source.file.path), source.key, source.dtype)
    if value.numel() == 0:
        return (id(module), name)
    layout = (value.shape, value.stride(), value.dtype, value.device)
    return (value.data_ptr(), *layout)


def _encode_graph(gm: GraphModule, tensors: _Tensors) -> dict[str, Any]:
    return {
        "class_name": type(gm).__name__,
        "info": to_json(info(gm)),
        "modules": {
            path: encode_module(path, module)
            for path, module in gm.named_modules(remove_duplicate=False)
        },
        "ties": tensors.ties,
        "orders": tensors.orders,
        "nodes": [encode_node(node) for node in gm.graph.nodes],
    }


class _Files:
    """Tensors of a checkpoint by name: read to the device, or left in their files."""

    def __init__(
        self,
        source: Path,
        files: list[str],
        data: dict[str, Any],
        device: torch.device,
        stream: bool,
    ) -> None:
        opened = [TensorFile.open(source / f) for f in files if f.endswith(".safetensors")]
        self._files = {name: file for file in opened for name in file.entries}
        self._ties, self._orders = data["ties"], data["orders"]
        self._device, self._stream = device, stream
        self._read: dict[str, Tensor] = {}
        self.used: set[str] = set()

    def source(self, name: str) -> Source:
        key = self._ties.get(name, name)
        if key not in self._files:
            raise CheckpointError(f"no tensor {key} in the files")
        self.used.add(key)
        file, order = self._files[key], self._orders.get(key)
        dtype = file.entries[key].dtype
        return Source(file, key, dtype, self._device, None if order is None else tuple(order))

    def streams(self, source: Source) -> bool:
        return self._stream and len(source.shape) > 1

    def read(self, source: Source, parameter: bool) -> Tensor:
        value = self._read.get(source.key)
        if value is None:
            value = source.read()
        if parameter and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        self._read[source.key] = value  # ties stay ties
        return value

    def check_all_used(self) -> None:
        unused = set(self._files) - self.used
        if unused:
            raise CheckpointError(f"nothing reads the tensors {', '.join(sorted(unused)[:4])}")


def _decode_graph(data: dict[str, Any], files: _Files) -> GraphModule:
    name = data["class_name"]
    if not (isinstance(name, str) and name.isidentifier()):
        raise CheckpointError(f"class name {name!r} is not an identifier")
    gm = GraphModule(nn.Module(), Graph(), name)
    for path, module in data["modules"].items():
        _install(gm, path, module, files)
    files.check_all_used()
    graph = decode_nodes(data["nodes"])
    _check_targets(gm, graph)
    gm.graph = graph
    set_info(gm, from_json(GraphInfo, data["info"]))
    return gm.eval()


def _check_targets(gm: GraphModule, graph: Graph) -> None:
    """Nodes may read tensors and call leaves, no other attribute of a module: a way to its
    ``__dict__`` would be one to run anything. CheckpointError names the node."""
    tensors = {
        *(name for name, _ in gm.named_parameters(remove_duplicate=False)),
        *(name for name, _ in gm.named_buffers(remove_duplicate=False)),
    }
    leaves = {name for name, _ in gm.named_modules(remove_duplicate=False) if name}
    for node in graph.nodes:
        known = {"get_attr": tensors, "call_module": leaves}.get(node.op)
        if known is not None and node.target not in known:
            raise CheckpointError(
                f"node {node.name!r}: target {node.target!r} of a {node.op} is no "
                f"{'tensor' if node.op == 'get_attr' else 'module'} of the saved graph"
            )


def _install(gm: GraphModule, path: str, data: dict[str, Any], files: _Files) -> None:
    tensors: dict[str, Tensor] = {}
    streamed: dict[str, Source] = {}
    for name, role in data.get("tensors", {}).items():
        if role.startswith(NONE):
            continue
        source = files.source(f"{path}.{name}" if path else name)
        if files.streams(source):
            streamed[name] = source
            tensors[name] = torch.empty(0, dtype=source.dtype, device="meta")
        else:
            tensors[name] = files.read(source, role == "parameter")
    if not path:
        register_tensors(gm, data.get("tensors", {}), tensors)
        return
    module = decode_module(path, data, tensors)
    if streamed:
        stream_leaf(module, streamed)
    gm.add_submodule(path, module)
