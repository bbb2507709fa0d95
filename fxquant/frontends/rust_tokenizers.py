"""What the Rust code of tokenizers raises, as errors with a class."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase as Tokenizer

from fxquant.errors import ModelError
from fxquant.files.doors import reason

# How Rust ends the text of an error that the operating system gave.
_OF_THE_SYSTEM: Final = re.compile(r"\(os error (\d+)\)$")


@contextlib.contextmanager
def rust_errors(doing: str) -> Iterator[None]:
    """What tokenizers raises, as a ModelError: its errors are of class Exception itself, and a
    panic of its Rust code is a BaseException."""
    try:
        yield
    except BaseException as error:
        if not _of_rust(error):
            raise
        raise ModelError(f"{doing}: {reason(error)}") from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files to ``folder``.

    Raises OSError where the system does not let it, ModelError for a tokenizer that no file can
    hold (one with a step of its user's own).
    """
    with rust_errors("the tokenizer cannot be saved"):
        try:
            tokenizer.save_pretrained(folder)
        except BaseException as error:
            number = _OF_THE_SYSTEM.search(str(error))
            if number is None or not _of_rust(error):
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _of_rust(error: BaseException) -> bool:
    return type(error) is Exception or type(error).__name__ == "PanicException"
