"""The one place where transformers reads a model, a config or a tokenizer.

No code of a checkpoint runs: trust_remote_code=False stands at every call (left out, transformers
asks on a terminal, and ``yes |`` answers), and ``own_generate`` where a model is read. What
transformers and tokenizers raise becomes a ModelError of one sentence.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from fxquant.errors import ModelError
from fxquant.files.doors import check_regular, check_text, door, read_object
from fxquant.frontends.hub import without_bars, without_notices
from fxquant.frontends.model_config import CONFIG, check_config, check_config_file, check_python
from fxquant.frontends.patching import exclusive, own_generate, parameters_on_meta
from fxquant.frontends.rust_tokenizers import rust_errors
from fxquant.frontends.tokenizer_files import (
    FULL,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    check_tokenizer_config,
    check_tokenizer_files,
    tokenizer_files,
)
from fxquant.frontends.weight_files import Stored, stored_weights
from fxquant.frontends.weight_names import check_names, match
from fxquant.frontends.written_by_5 import restore_experts, restore_rope, tokenizer_arguments

# What transformers raises on a file whose values it cannot use, besides reading errors.
_BAD_FILES: Final = (
    OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    ImportError, RuntimeError, MemoryError, SafetensorError, StrictDataclassError,
)  # fmt: skip
_GGUF: Final = getattr(transformers, "GgufConfig", None)
_CUSTOM: Final = "custom code"  # in transformers' error where it would have to run some
GENERATION: Final = "generation_config.json"
_JSON: Final = (
    GENERATION,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "vocab.json",
)
_READ: Final = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja")


def read_config(
    source: str | Path, revision: str | None = None, *, offline: bool = False, coded: bool = False
) -> PretrainedConfig:
    """The config of a hub model or of a folder; ``offline``: only from the cache; ``coded``: of an
    export, whose weights may be codes.

    Raises ModelError naming file and field.
    """
    directory = Path(source)
    if directory.is_dir():
        check_files(directory)
        check_config_file(directory, coded)
    if (directory / GENERATION).exists():  # it comes with a model that is read as a whole
        with _reading(str(source), GENERATION):
            GenerationConfig.from_dict(read_object(directory / GENERATION, ModelError))
    with _reading(str(source), CONFIG):
        config = AutoConfig.from_pretrained(
            str(source), revision=revision, local_files_only=offline, trust_remote_code=False
        )
    check_config(config, str(source))
    restore_rope(config, str(source))
    restore_experts(config)
    return config


def read_tokenizer(
    source: str | Path,
    revision: str | None = None,
    *,
    fast: bool = True,
    offline: bool = False,
    coded: bool = False,
) -> Tokenizer:
    """The tokenizer of a hub model or of a folder; ``offline`` and ``coded`` as in read_config.

    Raises ModelError naming the file: damaged, or one that names files of elsewhere.
    """
    directory = Path(source)
    own: Path | None = directory / TOKENIZER_CONFIG
    if directory.is_dir():
        check_files(directory)
        check_tokenizer_files(directory)
        if (directory / CONFIG).exists():  # transformers takes the tokenizer's class from it
            check_config_file(directory, coded)
        if fast and (directory / FULL).exists():
            _check_fast(directory / FULL)
    else:
        own = _check_of_hub(str(source), revision, offline)
    arguments = tokenizer_arguments(own)
    reader = AutoTokenizer if arguments is None else PreTrainedTokenizerFast
    with _reading(str(source), "tokenizer"), without_notices():
        tokenizer: Tokenizer = reader.from_pretrained(
            str(source),
            use_fast=fast,
            revision=revision,
            local_files_only=offline,
            trust_remote_code=False,
            **(arguments or {}),
        )
        if not len(token_ids(tokenizer, "a")) and not tokenizer.vocab_size:
            raise ValueError("it has no vocabulary")
    return tokenizer


def token_ids(tokenizer: Tokenizer, text: str) -> Tensor:
    """Ids int64 [T] of a text, with the special tokens that the tokenizer adds.

    Raises ModelError naming the tokenizer where it has no ids for the text, DataError for a text
    that holds half a character.
    """
    check_text(text, "the text")
    with rust_errors(f"the tokenizer of {tokenizer.name_or_path} cannot encode the text"):
        # verbose=False: the warning about sequences longer than the model does not apply.
        encoded = tokenizer(text, return_tensors="pt", verbose=False)
    ids = encoded["input_ids"][0]
    assert isinstance(ids, Tensor)
    return ids.to(torch.int64)


@exclusive
def read_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str,
    revision: str | None = None,
    offline: bool = False,
) -> PreTrainedModel:
    """A causal LM with its weights; ``dtype`` may be "auto", the stored one; ``offline``: only from
    the cache.

    Raises ModelError where config and weights are not of one model, by the rules of
    ``weight_names.match``: before anything is read where ``source`` is a folder.
    """
    check_python()
    directory = Path(source)
    config = read_config(source, revision, offline=offline)
    found: Mapping[str, Stored] = {}
    if directory.is_dir():
        found, _ = match(empty_model(config, str(source)), stored_weights(directory), directory)
    with _reading(str(source), "weights"), without_bars(directory.is_dir()), own_generate():
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(source),
            config=config,
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=offline,
            trust_remote_code=False,
            weights_only=True,
        )
    check_names(str(source), list(loading["missing_keys"]), list(loading["unexpected_keys"]))
    _read_left(model, found, str(source))
    return model


@exclusive
def read_written(directory: Path) -> PreTrainedModel:
    """What transformers makes of a folder that an export wrote, codes and all; float32."""
    check_python()
    with _reading(str(directory), "weights"), without_bars(True), own_generate():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        )
    return model


def _read_left(model: PreTrainedModel, found: Mapping[str, Stored], name: str) -> None:
    """What transformers leaves on meta: a tied weight that is stored as the head's alone."""
    left = {
        key: value for key, value in model.named_parameters(remove_duplicate=False) if value.is_meta
    }
    check_names(name, sorted(left.keys() - found.keys()), [])
    for key, value in left.items():
        path, _, own = key.rpartition(".")
        read = nn.Parameter(found[key].read().to(value.dtype), value.requires_grad)
        setattr(model.get_submodule(path), own, read)
    if left:
        model.tie_weights()


@exclusive
def empty_model(
    config: PretrainedConfig,
    name: str,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal LM that ``config`` describes, its parameters on meta and tied.

    Raises ModelError for values that make no model.
    """
    check_python()
    with _reading(name, CONFIG), parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model


def read_gguf(file: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """Model (float32) and tokenizer of a GGUF file. Raises ModelError naming it."""
    return read_gguf_model(file), read_gguf_tokenizer(file)


@exclusive
def read_gguf_model(file: Path) -> PreTrainedModel:
    """The model of a GGUF file, float32, its blocks dequantized. Raises ModelError naming it."""
    check_python()
    check_regular(file, ModelError)
    # transformers 5 may leave the weights packed, for kernels that it takes from the hub.
    options = {"quantization_config": _GGUF(dequantize=True)} if _GGUF is not None else {}
    with _reading(str(file), "GGUF"), without_notices(), own_generate():
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=torch.float32,
            trust_remote_code=False,
            **options,
        )
    return _plain(model, str(file))


def read_gguf_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer that transformers makes of a GGUF file. Raises ModelError naming it."""
    check_regular(file, ModelError)
    with _reading(str(file), "GGUF"), without_notices():
        found: Tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, trust_remote_code=False
        )
    return found


def _plain(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model without the mark of what it was read from, which forbids to save it."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config
    plain = empty_model(config, name, torch.float32)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def check_files(directory: Path) -> None:
    """Raise ModelError, naming the file, for what transformers would read without end (a pipe)
    or could not parse."""
    for pattern in _READ:
        for path in sorted(directory.glob(pattern)):
            check_regular(path, ModelError)
    for name in _JSON:
        if (directory / name).exists():
            read_object(directory / name, ModelError)


def _check_of_hub(name: str, revision: str | None, offline: bool) -> Path | None:
    """What ``check_tokenizer_files`` does, of the files of a hub model, which come to the cache.

    The path of its tokenizer_config.json, if it has one.
    """
    read: dict[str, Path] = {}
    for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        found = _of_hub(name, file, revision, offline)
        if found is not None:
            read[file] = found
            check_tokenizer_config(found)
    return read.get(TOKENIZER_CONFIG)


def hub_holds_tokenizer(name: str, revision: str | None = None, *, offline: bool = False) -> bool:
    """As ``holds_tokenizer``, of a hub model; ``offline`` as in read_config."""
    return any(_of_hub(name, file, revision, offline) for file in TOKENIZER_FILES)


def _of_hub(name: str, file: str, revision: str | None, offline: bool) -> Path | None:
    """A tokenizer's file of a hub model, in the cache; None where it has none of that name."""
    with _reading(name, "tokenizer"):
        found = cached_file(
            name,
            file,
            revision=revision,
            local_files_only=offline,
            _raise_exceptions_for_missing_entries=False,
        )
    return None if found is None else Path(found)


def _check_fast(path: Path) -> None:
    """transformers takes a damaged tokenizer.json for one of another library."""
    with rust_errors(f"{path} is no tokenizer"):
        FastTokenizer.from_file(str(path))


@contextlib.contextmanager
def _reading(name: str, part: str) -> Iterator[None]:
    advice = "a directory needs what save_pretrained writes for a causal LM and its tokenizer"
    held = tokenizer_files(Path(name)) if part == "tokenizer" else ()
    if held:
        there = "is there" if len(held) == 1 else "are there"
        advice = f"of its files {', '.join(held)} {there}; {advice}"
        advice += ", and convert and export take --no-tokenizer where no text is read"
    if not Path(name).exists():
        advice = f"a hub name needs the network or a filled cache; {advice}"
    with door(ModelError, f"cannot load {name}: {part}", _BAD_FILES, advice):
        try:
            yield
        except ValueError as error:
            if _CUSTOM not in str(error):
                raise
            raise ModelError(
                f"{name} needs custom code ({part}: its auto_map), which fxquant does not run: "
                "take a checkpoint of an architecture that transformers has"
            ) from error
