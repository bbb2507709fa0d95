"""Weights of a package are converted once: a second load finds them whole and writes nothing."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fxquant
from fxquant.errors import CacheWarning
from fxquant.evaluation import models
from fxquant.evaluation.kept_folder import SUMS
from tests.models import small_opt


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a GGUF file of one tensor, which is read as the small OPT; an empty cache."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    folder = tmp_path / "site" / "tiny_words_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('a package is not imported')\n")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "opt")
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("a", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "read_gguf", lambda _: small_opt())
    yield "package:tiny-words-model"
    sys.modules.pop("tiny_words_model", None)


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Of each file below the folder: its inode, when it was changed, what it holds."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = ((path, path.stat()) for path in files)
    return {
        str(path): (facts.st_ino, facts.st_mtime_ns, path.read_bytes()) for path, facts in found
    }


def test_a_second_load_warns_of_nothing_and_writes_nothing(package: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "fxquant"
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        first = fxquant.load_model(package)
        kept = state(cache)
        again = [fxquant.load_model(package, streamed=streamed) for streamed in (False, True)]
        assert state(cache) == kept
    assert sum(name.endswith(SUMS) for name in kept) == 1
    assert {each.revision for each in again} == {first.revision}
    assert first.weights.startswith("dequantized from GGUF: 100.00% Q4_1")
    assert {each.weights for each in again} == {first.weights}
    ids = torch.randint(4, 1000, (1, 16), generator=torch.Generator().manual_seed(4))
    assert torch.equal(first.graph(ids), again[0].graph(ids))


def test_what_was_damaged_between_two_loads_is_made_again_once(
    package: str, tmp_path: Path
) -> None:
    first = fxquant.load_model(package)
    (weights,) = (tmp_path / "cache").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.warns(CacheWarning, match="is damaged .* made again"):
        assert fxquant.load_model(package).revision == first.revision
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        assert fxquant.load_model(package).revision == first.revision
