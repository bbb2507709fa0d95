"""A graph's float side as transformers' own modules hold it, or why they cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import PretrainedConfig, PreTrainedModel

from fxquant.errors import ExportError, ModelError
from fxquant.exports.shards import write_shards
from fxquant.exports.sites import CodedSite, coded_sites
from fxquant.files.temporary import room_for, temporary_folder
from fxquant.frontends.model_config import CONFIG
from fxquant.frontends.pretrained import empty_model, read_config
from fxquant.ir.graph import float_dtype, info, tag
from fxquant.ir.leaves import Conv1D, QuantizedParameters
from fxquant.ir.operands import op_name
from fxquant.ir.streamed import sources_of

# Passes whose nodes are the float model's own, or what a quantized site stands as.
_OF_THE_MODEL: Final = ("trace", "name_sites", "quantize", "integerize")
# Repairs that may be the reason for what another pass has done.
_BEHIND: Final = {
    "decompose_attention": ("attn8", "kv8", "kv4"),
    "bias": ("correct_bias", "rotate"),
}
# Forms of a repair that leave everything in the model's own tensors.
MILDER: Final = {
    "rotate_inputs": "the scheme with +rotate(online=false)",
    "smooth": "the scheme with +smooth",
    "awq": "the scheme without +awq",
}


@dataclass(frozen=True)
class Modules:
    """What transformers builds from the graph's config: every parameter, on meta.

    ``config`` is config.json's content.
    """

    gm: GraphModule
    model: PreTrainedModel
    config: dict[str, Any]

    @classmethod
    def of(cls, gm: GraphModule) -> Modules:
        """Raises ExportError for a graph without the config of its model."""
        text = info(gm).config
        if not text:
            raise ExportError(
                "the graph does not hold its model's config, which the engine builds the model "
                "from: convert the model with fxquant.convert or fxquant.trace"
            )
        config = _config(text)
        return cls(gm, empty_model(config, info(gm).model, float_dtype(gm)), json.loads(text))

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @cached_property
    def keys(self) -> dict[str, Tensor]:
        """What a checkpoint of the model holds, tied names too, as meta tensors."""
        return dict(self.model.state_dict(keep_vars=True))

    def kind(self, path: str) -> type[nn.Module] | None:
        """Class of the module at ``path``, None where there is none."""
        try:
            return type(self.model.get_submodule(path))
        except AttributeError:
            return None

    def check(self, target: str) -> None:
        """Raise ExportError, naming ``target``, site and pass, for what the modules cannot hold."""
        for node in self.gm.graph.nodes:
            if tag(node).origin not in _OF_THE_MODEL:
                origin = tag(node).origin
                raise ExportError(
                    f"{target} cannot hold {tag(node).site or node.name}: {origin} put "
                    f"{_said(node)} into the graph, which no module of {self.name} does; nearest "
                    f"that it can: {MILDER.get(origin, self._without(origin))}"
                )
            self._check_called(target, node)
        for name, value in self._held():
            known = self.keys.get(name)
            if known is None or known.shape != value.shape:
                there = "no such tensor" if known is None else f"one of shape {list(known.shape)}"
                path, _, own = name.rpartition(".")
                nearest = f"; nearest that it can: {self._without('bias')}" if own == "bias" else ""
                raise ExportError(
                    f"{target} cannot hold {path}: the graph has {own} {list(value.shape)} there, "
                    f"{self.name} has {there}{nearest}"
                )
        coded = {f"{path}.weight" for path in self.coded}
        known_ids = {id(self.keys[name]) for name, _ in self._held()}
        for name, value in self.keys.items():
            if name in coded or id(value) in known_ids:
                continue
            if self._neutral(name) is None:
                raise ExportError(
                    f"{target} cannot hold {info(self.gm).model}: {self.name} needs {name}, which "
                    "the graph does not hold"
                )

    def _check_called(self, target: str, node: Node) -> None:
        """Raise ExportError where the graph calls another kind of module than the model has."""
        if node.op != "call_module":
            return
        path = str(node.target)
        kind, held = self.kind(path), self.gm.get_submodule(path)
        # These are compared by their tensors; a streamed class is a subclass.
        if kind is not None and not isinstance(held, (kind, nn.Linear, nn.Embedding, Conv1D)):
            raise ExportError(
                f"{target} cannot hold {path}: the graph calls {type(held).__name__} there, "
                f"{self.name} {kind.__name__}; nearest that it can: {self._without('rotate')}"
            )

    @cached_property
    def coded(self) -> set[str]:
        """Paths at which the graph holds codes."""
        parts = self.gm.named_modules()
        return {path for path, module in parts if isinstance(module, QuantizedParameters)}

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Name and reader of every float tensor but those of coded sites, each tied one once."""
        done: set[int] = set()
        held = {name for name, _ in self._held()}
        for name, value in self.keys.items():  # of tied names the model's first is the one it reads
            path, _, own = name.rpartition(".")
            if path in self.coded or (not self.unties and id(value) in done):
                continue
            if name in held:
                done.add(id(value))
                yield name, _Reader(self.gm.get_submodule(path), own)
            elif (neutral := self._neutral(name)) is not None:
                yield name, neutral.clone

    def _without(self, origin: str) -> str:
        ran = {record.name for record in info(self.gm).history}
        behind = [name for name in _BEHIND.get(origin, (origin,)) if name in ran]
        return f"the scheme without {' and '.join(f'+{name}' for name in behind or [origin])}"

    def _neutral(self, name: str) -> Tensor | None:
        """The gain or bias of a norm that the graph has folded into what follows: that which does
        nothing. None where the tensor is none of a norm."""
        path, _, own = name.rpartition(".")
        module, value = self.model.get_submodule(path), self.keys[name]
        if value.dim() != 1 or getattr(module, "weight", None) is None:
            return None
        if own == "bias":
            return torch.zeros(value.shape, dtype=value.dtype)
        # Some multiply by their weight, some by 1 + weight: a norm's output has a mean square of 1.
        norm = copy.deepcopy(module).to_empty(device="cpu").float()
        x = torch.randn(64, *value.shape, generator=torch.Generator().manual_seed(0))
        for gain in (1.0, 0.0):
            with torch.no_grad():
                for each in norm.parameters():
                    each.zero_()
                norm.weight.fill_(gain)
                if abs(float(norm(x).square().mean()) - 1) < 0.01:
                    return torch.full(value.shape, gain, dtype=value.dtype)
        return None

    @cached_property
    def unties(self) -> bool:
        """Whether the graph has two tensors where the model has one under two names."""
        first: dict[int, str] = {}
        for name in self.keys:
            other = first.setdefault(id(self.keys[name]), name)
            if other != name and not self._one_tensor(other, name):
                return True
        return False

    def _one_tensor(self, first: str, second: str) -> bool:
        pair = []
        for name in (first, second):
            path, _, own = name.rpartition(".")
            if path in self.coded:
                return False
            try:
                module = self.gm.get_submodule(path)
            except AttributeError:
                return True  # the graph holds the other name alone
            if not hasattr(module, own):
                return True
            source = sources_of(module).get(own)
            pair.append(source.identity if source else getattr(module, own))
        if isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
            return pair[0].data_ptr() == pair[1].data_ptr() or torch.equal(pair[0], pair[1])
        return bool(pair[0] == pair[1])

    def _computes(self, path: str, name: str) -> bool:
        """Whether the model makes this tensor when it is built: a buffer that is not saved, or a
        tensor that is no buffer."""
        try:
            owner = self.model.get_submodule(path)
        except AttributeError:
            return False
        return isinstance(getattr(owner, name, None), Tensor)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """Name and stand-in of each float tensor, but what the model computes by itself."""
        parts = self.gm.named_modules(remove_duplicate=False)
        for path, module in parts:
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                full = f"{path}.{name}" if path else name
                if value is None or (full not in self.keys and self._computes(path, name)):
                    continue
                if not isinstance(module, QuantizedParameters) or name == "bias":
                    yield full, value


def check_modules(target: str, gm: GraphModule) -> None:
    """Raise ExportError for what stands in a converted graph that no module of its model does."""
    Modules.of(gm).check(target)


Layout = Callable[[CodedSite], dict[str, Tensor]]


def write_modules(
    modules: Modules,
    folder: Path,
    quantization: dict[str, Any],
    layout: Layout,
    dtype: torch.dtype | None = None,
) -> None:
    """Shards of float tensors, and of what ``layout`` makes of codes; config.json, which says
    ``dtype``, if not the graph's own."""
    config = {**modules.config, "quantization_config": quantization}
    named = str(dtype or float_dtype(modules.gm)).removeprefix("torch.")
    config["torch_dtype"] = config["dtype"] = named
    if modules.unties:
        config["tie_word_embeddings"] = False
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_shards(folder, _tensors(modules, layout))


def _tensors(modules: Modules, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    for name, read in modules.tensors():
        yield name, read()
    for site in coded_sites(modules.gm):
        for name, value in layout(site).items():
            yield f"{site.path}.{name}", value
        bias = site.bias()
        if bias is not None:
            yield f"{site.path}.bias", bias


def _config(text: str) -> PretrainedConfig:
    """transformers' config of config.json's ``text``.

    Raises ExportError for a config that is none, and where no temporary file can be written.
    """
    what = "the graph's config lies there"
    with temporary_folder(what, ExportError) as folder:
        with room_for(folder / CONFIG, what, ExportError):
            (folder / CONFIG).write_text(text, encoding="utf-8")
        try:
            return read_config(folder)
        except ModelError as error:
            said = str(error).replace(f"{folder}/", "").replace(str(folder), "the graph's config")
            raise ExportError(f"the graph holds a config that makes no model: {said}") from error


@dataclass(frozen=True)
class _Reader:
    """Reads a tensor when it is called: a streamed one is not held before."""

    module: nn.Module
    name: str

    def __call__(self) -> Tensor:
        value: Tensor = getattr(self.module, self.name)
        return value.detach().cpu()


def _said(node: Node) -> str:
    if node.op in ("call_module", "get_attr"):
        return str(node.target)
    return f"a call of {op_name(node)}"
