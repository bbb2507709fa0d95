"""Whether the model hub can be asked, and what transformers says that does not apply."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator

import httpx
from huggingface_hub import constants, get_session
from transformers.utils import logging as hf_logging

TIMEOUT = 3.0  # seconds for a connection; a download that has begun may take any time
PATIENCE = 3 * TIMEOUT  # for the whole answer, looking up the address included, which has no bound

_OFFLINE = threading.Lock()  # the setting is the process's

# (logger, beginning): notices that do not apply. ``legacy`` is a choice of slow Llama tokenizers,
# which have their own logger: a tokenizer.json or a GGUF file says by itself what the fast one
# does. The class is one of transformers 5, which 4.57 has under another name.
_NOTICES = (
    (
        "transformers.models.llama.tokenization_llama_fast",
        "You are using the default legacy behaviour of the ",
    ),
    (
        "transformers.tokenization_utils_base",
        "The tokenizer class you load from this checkpoint is not the same type as the class this "
        "function is called from. It may result in unexpected tokenization. \n"
        "The tokenizer class you load from this checkpoint is 'TokenizersBackend'. ",
    ),
)


def hub_is_reachable() -> bool:
    """Whether anything answers at the hub's address within PATIENCE seconds, asked once.

    huggingface_hub asks six times, for half a minute, and warns each time. Proxies and
    ``HF_ENDPOINT`` count as they do for it; ``HF_HUB_OFFLINE`` means no.
    """
    answers: list[bool] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
            answers.append(True)
        except (OSError, httpx.HTTPError, httpx.InvalidURL):  # of huggingface_hub 0 and 1
            answers.append(False)
        except BaseException as error:
            errors.append(error)

    # The system looks up names without a timeout: where nothing answers, it is left at it.
    thread = threading.Thread(target=ask, name="fxquant-hub", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if errors:
        raise errors[0]
    return answers == [True]


@contextlib.contextmanager
def datasets_offline(applies: bool) -> Iterator[None]:
    """Where it ``applies``, datasets looks into its cache alone within the block, as under
    ``HF_DATASETS_OFFLINE``: it would ask the hub six times, for half a minute."""
    if not applies:
        yield
        return
    from datasets import config  # slow to import, and few commands read a dataset

    with _OFFLINE:
        before = config.HF_HUB_OFFLINE
        config.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Within the block, transformers does not say of tokenizers what does not apply."""
    with contextlib.ExitStack() as stack:
        for name, beginning in _NOTICES:
            logger = logging.getLogger(name)
            applies = functools.partial(_applies, beginning)
            logger.addFilter(applies)
            stack.callback(logger.removeFilter, applies)
        yield


def _applies(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


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
