"""Save a graph to a folder and load it without the float model.

manifest.json              format version, checksums
graph.json                 nodes, modules, GraphInfo (scheme, sites, history)
weights-*.safetensors      codes, scales and what stayed float
config.json, tokenizer     as the Hugging Face model has them
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.checkpoint.dataclass_json import from_json, to_json
from fxquant.checkpoint.graph_json import encode_node
from fxquant.checkpoint.manifest import check_manifest, is_checkpoint, read_regular, write_manifest
from fxquant.checkpoint.module_json import encode_module
from fxquant.checkpoint.saved_graph import (
    Files,
    Held,
    check_fields,
    check_graph,
    check_nodes,
    decode_graph,
)
from fxquant.checkpoint.saved_info import check_info
from fxquant.checkpoint.saved_names import check_path
from fxquant.checkpoint.target import is_empty, partial_folder, put_in_place, saving
from fxquant.errors import CheckpointError, FxquantError
from fxquant.files.doors import Location, as_path, door, parse_json, reason
from fxquant.files.tensor_file import storage_order
from fxquant.frontends.rust_tokenizers import save_tokenizer
from fxquant.ir.blocks import block_of
from fxquant.ir.graph import GraphInfo, info
from fxquant.ir.streamed import check_present, sources_of
from fxquant.pipeline.arguments import as_device, checked_call

GRAPH, CONFIG = "graph.json", "config.json"


@checked_call("tokenizer", path="directory")
def save(gm: GraphModule, directory: Location, tokenizer: Tokenizer | None = None) -> None:
    """Write ``gm`` (level float, qdq or integer) to ``directory``, whole or not at all.

    Tied tensors are written once. An earlier checkpoint there is replaced; any other folder with
    something in it is not. A streamed graph is written block by block. A graph
    of level kernels is refused: FuseKernels makes it again from the integer graph, bit for bit; and
    so is one of level kernels-inexact, which FuseFp8 makes from that.

    Raises CheckpointError before anything is written: a node or module that the format does not
    know (named, with its target), a folder that is in use or cannot be written; and where writing
    fails (a full disk), which leaves nothing behind.
    """
    info(gm)  # GraphError for what is no graph of ours
    target = as_path(directory, "directory", CheckpointError)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise CheckpointError(
            f"a {type(tokenizer).__name__} is no tokenizer: pass fxquant.load_model(name).tokenizer"
        )
    check_target(target)
    with saving(target):
        _save(gm, target, tokenizer)


def _save(gm: GraphModule, target: Path, tokenizer: Tokenizer | None) -> None:
    tensors = _Tensors(gm)
    try:
        text = json.dumps(check_fields(_encode_graph(gm, tensors)), separators=(",", ":"))
        _check_loadable(gm, text, tensors)
    except FxquantError as error:
        raise CheckpointError(f"the graph cannot be saved: {error}") from error
    with _writing(target), partial_folder(target) as partial:
        (partial / GRAPH).write_text(text, encoding="utf-8")
        for number, group in enumerate(tensors.by_block(info(gm).blocks)):
            save_file(group, partial / f"weights-{number:05}.safetensors")
        if info(gm).config:
            (partial / CONFIG).write_text(info(gm).config, encoding="utf-8")
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        write_manifest(partial)
        put_in_place(partial, target)


@contextlib.contextmanager
def _writing(target: Path, advice: str = "") -> Iterator[None]:
    with door(CheckpointError, f"cannot write {target}", (OSError, SafetensorError), advice):
        yield


def _check_loadable(gm: GraphModule, text: str, tensors: _Tensors) -> None:
    """Raise what ``load`` would refuse it with."""
    check_present(gm)
    check_nodes(_parsed(text), Held(gm, tensors.ties, tensors.orders))
    check_graph(gm, "save")


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        return check_fields(parse_json(text, unique=True))
    except ValueError as error:
        raise CheckpointError(f"it is no JSON of a graph: {reason(error)}") from error


def check_target(directory: Path) -> None:
    """Make the parent folder; raise CheckpointError where ``save`` could not write there or would
    replace what is no checkpoint."""
    if directory.exists() and not (is_checkpoint(directory) or is_empty(directory)):
        raise CheckpointError(
            f"{directory} exists and is not a checkpoint of fxquant; give another folder"
        )
    with _writing(directory, "give another folder"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(directory):  # the longest name that stands beside it
            pass


@checked_call()
def load(
    directory: Location, device: str | torch.device = "cpu", *, stream: bool = False
) -> GraphModule:
    """The graph that ``save`` wrote, on ``device``, bit for bit; no float model is needed.

    ``stream``: tensors of matrices stay in the files and are read when a node needs them.

    Raises CheckpointError for a folder that is damaged, truncated, foreign or of a newer format
    version, and for a graph that contains anything but the listed operations.
    """
    source = as_path(directory, "directory", CheckpointError)
    first = as_device(device, CheckpointError)
    if stream and first.type == "meta":
        raise CheckpointError("stream=True reads tensors, which device 'meta' has none of")
    listed = check_manifest(source)
    if GRAPH not in listed:
        raise CheckpointError(f"{source}: its manifest lists no {GRAPH}; save it again")
    with _describing(source):
        text = read_regular(source / GRAPH, listed[GRAPH])
        data = _parsed(text)
        weights = [source / name for name in listed if name.endswith(".safetensors")]
        # Checked on the CPU, then moved as a whole; streamed tensors are read to the device.
        target = first if stream else torch.device("cpu")
        gm = decode_graph(data, Files(weights, data, target, stream))
    return gm if stream else gm.to(first)


def saved_facts(directory: Path) -> GraphInfo:
    """What a saved graph says of itself, without a look at its tensors, which only ``load`` checks.

    Raises CheckpointError where that cannot be read.
    """
    with _describing(directory):
        data = _parsed(read_regular(directory / GRAPH))
        facts = from_json(GraphInfo, data["info"])
        check_info(facts)
    assert isinstance(facts, GraphInfo)
    return facts


@contextlib.contextmanager
def _describing(source: Path) -> Iterator[None]:
    """What reading a graph's description raises, as a CheckpointError that names its file."""
    try:
        yield
    except FxquantError as error:
        raise CheckpointError(f"{source / GRAPH}: {error}; save it again") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {reason(error)}") from error


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
        parts: dict[str | None, list[str]] = {}
        for key in self.owners:
            parts.setdefault(block_of(key, blocks), []).append(key)
        for part in (*blocks, None):
            if part in parts:
                yield {key: self._stored(key) for key in parts[part]}

    def _stored(self, key: str) -> Tensor:
        module, name = self.owners[key]
        value: Tensor = getattr(module, name).detach()
        return value.permute(self.orders.get(key, list(range(value.dim())))).contiguous().cpu()


def _identity(module: nn.Module, name: str, value: Tensor) -> Any:
    source = sources_of(module).get(name)
    if source is not None:
        return source.identity
    if value.numel() == 0:
        return (id(module), name)
    layout = (value.shape, value.stride(), value.dtype, value.device)
    return (value.data_ptr(), *layout)


def _encode_graph(gm: GraphModule, tensors: _Tensors) -> dict[str, Any]:
    check_info(info(gm))
    for path in (*tensors.owners, *tensors.ties):
        check_path(path, "a tensor")
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
