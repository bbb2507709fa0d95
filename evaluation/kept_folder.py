"""A folder that is kept between runs with the checksums of its files, and made again if damaged."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from fxquant.errors import CacheWarning, DataError, WriteError
from fxquant.files.doors import parse_json, read_bytes
from fxquant.files.locks import reason
from fxquant.files.whole_file import file_hash

SUMS: Final = "sha256.json"


def is_intact(folder: Path) -> bool:
    """Whether ``folder`` is there and holds what ``keep`` let it hold; a warning says what is
    damaged."""
    if not folder.exists():
        return False
    try:
        if (folder / SUMS).is_symlink():
            raise ValueError(f"{SUMS} is no regular file")
        if parse_json(read_bytes(folder / SUMS)) == _sums(folder):
            return True
        raise ValueError("its files do not fit their checksums")
    except (OSError, ValueError, DataError) as error:
        warnings.warn(
            f"{folder} is damaged ({reason(error)}): it is made again", CacheWarning, stacklevel=2
        )
        return False


@contextlib.contextmanager
def keep(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then is ``folder``, whole or not at all.

    One that is there is replaced; another process that does the same at the same time does no
    harm. Raises WriteError where it cannot be written, and leaves nothing behind.
    """
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        (partial / folder.name).mkdir()
        yield partial / folder.name
        (partial / folder.name / SUMS).write_text(json.dumps(_sums(partial / folder.name)))
        if folder.exists():
            folder.rename(partial / "damaged")
        (partial / folder.name).rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.exists():
            raise WriteError(
                f"cannot keep {folder}: {reason(error)}; make room there, or name another folder "
                "in XDG_CACHE_HOME"
            ) from error
    finally:  # Ctrl-C too must not leave half of it behind
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _sums(folder: Path) -> dict[str, str]:
    """sha256 by name. Raises ValueError for anything but regular files."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name} is no regular file")
        if path.name != SUMS:
            found[path.name] = file_hash(path)
    return found
