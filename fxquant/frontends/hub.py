"""Whether the model hub can be asked, and what transformers says that does not apply."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import httpx
from huggingface_hub import constants, get_session
from transformers.utils import logging as hf_logging

TIMEOUT = 3.0  # seconds for a connection; a download that has begun may take any time

_LEGACY = "You are using the default legacy behaviour of the "
_FAST_LLAMA = logging.getLogger("transformers.models.llama.tokenization_llama_fast")


def hub_is_reachable() -> bool:
    """Whether anything answers at the hub's address, asked once.

    huggingface_hub asks six times, for half a minute, and warns each time. Proxies and
    ``HF_ENDPOINT`` count as they do for it; ``HF_HUB_OFFLINE`` means no.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except (OSError, httpx.HTTPError, httpx.InvalidURL):  # of huggingface_hub 0 and 1
        return False
    return True


@contextlib.contextmanager
def without_legacy_notice() -> Iterator[None]:
    """Within the block, fast Llama tokenizers do not speak of ``legacy``.

    It is a choice of the slow ones, which have their own logger: a tokenizer.json or a GGUF file
    says by itself what the fast one does.
    """

    def applies(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_LEGACY)

    _FAST_LLAMA.addFilter(applies)
    try:
        yield
    finally:
        _FAST_LLAMA.removeFilter(applies)


@contextlib.contextmanager
def without_bars(applies: bool) -> Iterator[None]:
    """Where it ``applies``, transformers shows no progress bar within the block: transformers 5
    has one for weights that are read in a moment, on terminals and elsewhere."""
    shown = hf_logging.is_progress_bar_enabled()
    if applies:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if applies and shown:
            hf_logging.enable_progress_bar()
