"""A folder read whole and the same folder streamed: both refuse it, or both give the same logits.

The seed, in each assertion, follows --seed, or is FXQUANT_FUZZ_SEED.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxquant.errors import FxquantError, ModelError
from fxquant.frontends.pretrained import read_model
from fxquant.frontends.streaming import stream
from fxquant.frontends.weight_files import INDEX, WEIGHTS
from tests.architectures import ARCHITECTURES, token_ids
from tests.attack.conftest import SeedOf
from tests.attack.folder_faults import FORMATS, Checkpoint, Metadata, faulty
from tests.attack.watch import watched

SEED = 20261127
NAMES = ("opt", "opt-untied", "gpt2", "llama")
IDS = token_ids(2, 7)
SAVED: dict[str, Checkpoint] = {}


@pytest.fixture(scope="module", autouse=True)
def _saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        ARCHITECTURES[name]().save_pretrained(folder)
        SAVED[name] = Checkpoint.read(folder)


def logits_of(model: PreTrainedModel) -> Tensor | FxquantError:
    """transformers' own error where the model cannot run, such as one without return_dict."""
    try:
        logits: Tensor = model(input_ids=IDS, use_cache=False, return_dict=True).logits
    except (AttributeError, RuntimeError, ValueError, IndexError, TypeError) as error:
        return ModelError(f"{model.name_or_path} runs into {error!r}")
    return logits


def both(folder: Path) -> tuple[Tensor | FxquantError, Tensor | FxquantError]:
    """Logits or the error of each road."""
    found: list[Tensor | FxquantError] = []
    for streamed in (False, True):
        try:
            if streamed:
                model = stream(folder, dtype=torch.float32)
            else:
                model = read_model(folder, dtype=torch.float32).eval()
            with torch.no_grad():
                found.append(logits_of(model))
        except FxquantError as error:
            found.append(error)
    return found[0], found[1]


def check(folder: Path, where: str) -> str:
    """What both roads do with the folder; AssertionError where they do not do the same."""
    whole, streamed = both(folder)
    if isinstance(whole, Tensor) and isinstance(streamed, Tensor):
        assert whole.dtype == streamed.dtype, where
        assert torch.equal(whole.nan_to_num(7e7), streamed.nan_to_num(7e7)), where
        return "right"
    for result in (whole, streamed):
        assert isinstance(result, FxquantError), f"{where}: {whole!r} but {streamed!r}"
        text = str(result)
        assert str(folder) in text, f"{where}: {text}"
        assert len(text) < 1000, where
    return "one clear error"


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_both_roads_take_and_refuse_the_same_folders(
    count: int, tmp_path: Path, seed_of: SeedOf
) -> None:
    seed = seed_of(SEED) + count
    rng, counts = random.Random(seed), Counter[str]()
    for index in range(count):
        name = rng.choice(NAMES)
        found, faults = faulty(SAVED[name], rng)
        folder = tmp_path / str(index) / "model"
        folder.mkdir(parents=True)
        found.write(folder)
        where = f"seed {seed}, folder {index}: {name} with {faults}"
        try:
            counts[check(folder, where)] += 1
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}") from error
    print(f"seed {seed}: {count} tried, {dict(counts)}, 0 wrong")
    assert min(counts["right"], counts["one clear error"]) > count // 10


def write(folder: Path, name: str = "opt", **changes: Any) -> Path:
    folder.mkdir(parents=True)
    found = copy.deepcopy(SAVED[name])
    for key, value in changes.items():
        setattr(found, key, value)
    found.write(folder)
    return folder


@pytest.mark.parametrize("metadata", FORMATS, ids=repr)
def test_the_framework_that_weights_are_of(metadata: Metadata, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", metadata=metadata)
    right = metadata is None or metadata.get("format") in ("pt", "mlx")
    assert check(folder, repr(metadata)) == ("right" if right else "one clear error")
    if not right:
        for result in both(folder):
            assert "not written for PyTorch" in str(result)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_a_tied_weight_under_the_heads_name_alone(name: str, tmp_path: Path) -> None:
    """transformers 4 leaves the embedding of such a file on meta."""
    expected = both(write(tmp_path / "both" / "model", name))[0]
    found = copy.deepcopy(SAVED[name])
    (table,) = (n for n in found.tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
    found.tensors["lm_head.weight"] = found.tensors.pop(table)
    found.shards = {WEIGHTS: list(found.tensors)}
    (tmp_path / "head").mkdir()
    found.write(tmp_path / "head")
    assert check(tmp_path / "head", name) == "right"
    assert isinstance(expected, Tensor)
    assert torch.equal(expected, both(tmp_path / "head")[0])  # type: ignore[arg-type]


REDIRECTED: dict[str, Callable[[str], Any]] = {
    "transformers_weights": lambda other: f"{other}/model.safetensors",
    "gguf_file": lambda other: f"{other}/model.gguf",
    "subfolder": lambda _: "../other", "variant": lambda _: "../other/x",
    "configuration_files": lambda other: [f"{other}/config.json"],
    "base_model_name_or_path": lambda other: other, "adapter_kwargs": lambda other: {"x": other},
    "kernel_config": lambda other: {"x": other}, "use_kernels": lambda _: True,
    "text_config": lambda other: {"transformers_weights": other},
}  # fmt: skip


@pytest.mark.parametrize("key", REDIRECTED)
def test_a_config_that_names_other_files(key: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other", "gpt2")
    config = {**SAVED["opt"].config, key: REDIRECTED[key](str(other))}
    folder = write(tmp_path / "model", config=config)
    with watched(folder) as seen:
        assert check(folder, key) == "one clear error"
    for result in both(folder):
        assert key in str(result)
    assert not [path for event, path in seen if event == "open" and str(other) in path]


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "{other}/model.safetensors", "./model.safetensors",
             "x/../model.safetensors", "/model.safetensors", "..", "~/model.safetensors",
             "package:../other", "file://{other}/model.safetensors", "../model/model.safetensors"]
)  # fmt: skip
def test_an_index_that_names_other_files(name: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other")
    file = name.format(other=other)
    index = {"metadata": {}, "weight_map": dict.fromkeys(SAVED["opt"].tensors, file)}
    folder = write(tmp_path / "model", shards={}, index=index)
    with watched(folder) as seen:
        assert check(folder, name) == "one clear error"
    assert not [path for event, path in seen if event == "open" and str(other) in path]
    for result in both(folder):
        assert INDEX in str(result)


def test_links_are_followed_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    expected = both(folder)[0]
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, tmp_path / "blobs" / str(number))
        file.symlink_to(tmp_path / "blobs" / str(number))
    assert check(folder, "links") == "right"
    assert torch.equal(expected, both(folder)[1])  # type: ignore[arg-type]


def test_a_generation_config_is_read_on_both(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", generation={"cache_implementation": "nope"})
    assert check(folder, "generation") == "one clear error"
    assert "generation_config.json" in str(both(folder)[1])
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "x": 1}))
    assert check(folder, "generation") == "right"


@pytest.mark.parametrize("name", NAMES)
def test_heads_that_transformers_would_cut_out(name: str, tmp_path: Path) -> None:
    config = {**SAVED[name].config, "pruned_heads": {"0": [1]}}
    folder = write(tmp_path / "model", name, config=config)
    assert check(folder, name) == "one clear error"
    assert all("pruned_heads" in str(result) for result in both(folder))
