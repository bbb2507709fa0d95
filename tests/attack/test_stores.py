"""What a run keeps for the next one, damaged in every way: found, said, never taken."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import fxquant
from fxquant.analysis.meter import Cost
from fxquant.analysis.store import Store
from fxquant.errors import CacheWarning, DataError, WriteError
from fxquant.evaluation.kept_folder import is_intact, keep
from fxquant.numerics.weight_codes import WeightCodes
from fxquant.run.block_store import CHECKSUM, BlockStore, Expected
from fxquant.schemes.scheme import Scheme
from tests.architectures import llama, token_ids
from tests.attack.conftest import SeedOf

SEED = 20
BLOCK, OTHER = "model.layers.0", "model.layers.1"
SCHEMES = ("w4-g16-asym", "w8", "w3-tensor")
Damage = Callable[[dict[str, Tensor], dict[str, str]], None]


# --- blocks of gptq and refine --------------------------------------------------------------------


def solved(seed: int, scheme: str) -> tuple[dict[str, Expected], dict[str, WeightCodes]]:
    """Random codes of two sites, as a solver may choose them."""
    spec = Scheme.parse(scheme).spec.weight
    assert spec is not None
    generator = torch.Generator().manual_seed(seed)
    low, high = spec.grid.codes
    expected, codes = {}, {}
    for site, shape in (("block.fc1", (12, 40)), ("block.fc2", (7, 12))):
        each = expected[site] = Expected(spec, shape)
        grid = each.grid_shape
        zeros = torch.randint(low, high + 1, grid, generator=generator, dtype=torch.int32)
        codes[site] = WeightCodes(
            torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8),
            torch.rand(grid, generator=generator) + 1e-3,
            zeros if spec.grid.has_zero_point else None,
            spec,
            note=f"layer error {seed}",
        )
    return expected, codes


def same(found: Mapping[str, WeightCodes] | None, codes: Mapping[str, WeightCodes]) -> bool:
    return found is not None and all(
        torch.equal(found[site].codes, one.codes)
        and torch.equal(found[site].scales, one.scales)
        and _equal(found[site].zero_points, one.zero_points)
        and found[site].note == one.note
        for site, one in codes.items()
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def loaded(store: BlockStore, expected: Mapping[str, Expected]) -> dict[str, WeightCodes] | None:
    """What is taken; where a file is there and is not taken, a warning has named it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = store.load(BLOCK, expected, torch.device("cpu"))
    path = store._path(BLOCK)
    assert path is not None
    warned = [str(w.message) for w in said if issubclass(w.category, CacheWarning)]
    assert bool(warned) == (found is None and os.path.lexists(path))
    assert all(f"{path} is damaged" in text and "computed again" in text for text in warned)
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_intact_block_is_taken(tmp_path: Path, scheme: str) -> None:
    expected, codes = solved(SEED, scheme)
    store = BlockStore(tmp_path, "run")
    (tmp_path / "run").mkdir()
    assert loaded(store, expected) is None
    store.save(BLOCK, codes)
    assert same(loaded(store, expected), codes)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"{BLOCK}.safetensors"]


def altered_bytes(tmp_path: Path, tries: int, seed: int) -> None:
    print(f"seed {seed}")
    draw = random.Random(seed)
    again = right = 0
    for number in range(tries):
        expected, codes = solved(draw.randrange(2**31), SCHEMES[number % len(SCHEMES)])
        store = BlockStore(tmp_path, f"run{number}")
        (tmp_path / f"run{number}").mkdir()
        store.save(BLOCK, codes)
        path = tmp_path / f"run{number}" / f"{BLOCK}.safetensors"
        content = bytearray(path.read_bytes())
        kind = draw.choice(("flip", "flip", "cut", "longer", "zeros"))
        at = draw.randrange(len(content))
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "longer":
            content += draw.randbytes(1 + at)
        else:
            content[at:] = bytes(len(content) - at)
        path.write_bytes(bytes(content))
        found = loaded(store, expected)
        again += found is None
        right += same(found, codes)
    print(f"{tries} tried, {again} computed again, {right} right (bytes without a meaning)")
    assert again + right == tries
    assert again > 0.9 * tries


def test_altered_bytes_are_never_taken(tmp_path: Path, seed_of: SeedOf) -> None:
    altered_bytes(tmp_path, 150, seed_of(SEED))


@pytest.mark.slow
def test_many_altered_bytes_are_never_taken(tmp_path: Path, seed_of: SeedOf) -> None:
    altered_bytes(tmp_path, 2500, seed_of(SEED + 1))


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        absent = torch.zeros(3, dtype=torch.int32)  # zero points that the grid does not have
        tensors[name] = change(tensors.get(name, absent))

    return damage


def _put(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        flat = tensor.clone().flatten()
        flat[-1] = value
        return flat.view(tensor.shape)

    return change


def _drop(tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    del tensors["block.fc2.scales"]


def _stranger(tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    tensors["block.fc3.codes"] = torch.ones(2, 2, dtype=torch.int8)


def _no_note(tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    del notes["block.fc1"]


RESIGNED: dict[str, Damage] = {
    "code too large": _set("block.fc1.codes", _put(127)),
    "code too small": _set("block.fc2.codes", _put(-128)),
    "scale 0": _set("block.fc1.scales", _put(0)),
    "scale negative": _set("block.fc1.scales", _put(-1)),
    "scale nan": _set("block.fc2.scales", _put(float("nan"))),
    "scale inf": _set("block.fc2.scales", _put(float("inf"))),
    "zero point too large": _set("block.fc1.zero_points", _put(1000)),
    "zero point too small": _set("block.fc1.zero_points", _put(-1000)),
    "codes int32": _set("block.fc1.codes", lambda t: t.int()),
    "codes float": _set("block.fc1.codes", lambda t: t.float()),
    "scales float64": _set("block.fc1.scales", lambda t: t.double()),
    "zero points int64": _set("block.fc1.zero_points", lambda t: t.long()),
    "codes transposed": _set("block.fc1.codes", lambda t: t.t().contiguous()),
    "codes with a row less": _set("block.fc1.codes", lambda t: t[1:].clone()),
    "codes with an axis more": _set("block.fc1.codes", lambda t: t[None].clone()),
    "scales of another shape": _set("block.fc1.scales", lambda t: torch.ones(3, 5)),
    "no codes": _set("block.fc1.codes", lambda t: t[:0].clone()),
    "a tensor less": _drop,
    "a tensor more": _stranger,
    "a note less": _no_note,
}


@pytest.mark.parametrize("scheme", ["w4-g16-asym", "w4-tensor", "w4"])
@pytest.mark.parametrize("name", RESIGNED)
def test_what_no_solver_chooses_is_not_taken(tmp_path: Path, name: str, scheme: str) -> None:
    """Under a checksum that fits."""
    expected, codes = solved(SEED, scheme)
    store = BlockStore(tmp_path, "run")
    (tmp_path / "run").mkdir()
    store.save(BLOCK, codes)
    path = tmp_path / "run" / f"{BLOCK}.safetensors"
    with safe_open(path, "pt") as file:
        notes = dict(file.metadata())
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del notes[CHECKSUM]
    RESIGNED[name](tensors, notes)
    notes[CHECKSUM] = store._checksum(BLOCK, tensors, notes)
    save_file(tensors, path, notes)
    assert loaded(store, expected) is None


@pytest.mark.parametrize(
    "kind", ["another block", "another run", "link", "dangling", "fifo", "dir"]
)
def test_another_file_in_its_place_is_not_taken(tmp_path: Path, kind: str) -> None:
    expected, codes = solved(SEED, "w4")
    store, foreign = BlockStore(tmp_path, "run"), BlockStore(tmp_path, "other")
    for folder in ("run", "other"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "run" / f"{BLOCK}.safetensors"
    if kind == "another block":
        store.save(OTHER, codes)
        (tmp_path / "run" / f"{OTHER}.safetensors").rename(path)
    elif kind == "another run":
        foreign.save(BLOCK, codes)
        shutil.copy(tmp_path / "other" / path.name, path)
    elif kind == "link":
        store.save(BLOCK, codes)
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert loaded(store, expected) is None
    if kind == "dir":
        with pytest.raises(WriteError, match=f"cannot write {path}"):
            store.save(BLOCK, codes)
        return
    store.save(BLOCK, codes)
    assert same(loaded(store, expected), codes)
    assert path.is_file()
    assert not path.is_symlink()


def test_a_damaged_block_changes_no_code(tmp_path: Path) -> None:
    """Through convert: the same graph, and the file is whole again."""

    def convert() -> dict[str, Tensor]:
        data = [token_ids(2, 24, seed=SEED)]
        return fxquant.convert(llama(), "w3+gptq", calibration=data, cache=tmp_path).state_dict()

    first = convert()
    (path,) = tmp_path.rglob(f"{BLOCK}.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(CacheWarning, match=f"{path} is damaged"):
        again = convert()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        convert()


# --- losses of explain and plan -------------------------------------------------------------------

VALUES = [(f"rescue model.layers.{n}.é {n}", 1.5 + n / 7, Cost(n / 3, 0.25 * n)) for n in range(6)]


def filled(folder: Path) -> Path:
    with Store(folder, "f" * 64) as store:
        for name, value, cost in VALUES:
            store.put(name, value, cost)
    (path,) = folder.iterdir()
    return path


def test_a_store_torn_at_any_byte_loses_the_torn_line_only(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    before = b"".join(lines[:-2])
    for end in range(len(before), len(whole)):
        path.write_bytes(whole[:end])
        with Store(tmp_path, "f" * 64) as store:
            kept = whole[:end].count(b"\n")
            assert store.values == {name: value for name, value, _ in VALUES[:kept]}
            assert path.read_bytes() == b"".join(lines[:kept])
            for each in VALUES[kept:] if end % 5 == 0 else ():
                store.put(*each)
        assert end % 5 or path.read_bytes() == whole


def altered_lines(folder: Path, tries: int, seed: int) -> None:
    print(f"seed {seed}")
    draw = random.Random(seed)
    path = filled(folder)
    whole = path.read_bytes()
    expected = {name: value for name, value, _ in VALUES}
    errors = right = 0
    for _ in range(tries):
        content = bytearray(whole)
        at = draw.randrange(len(content))
        content[at] = draw.choice([content[at] ^ 1 << draw.randrange(8), *b'\n\r"{}0e-N', 0, 255])
        path.write_bytes(content)
        try:
            with Store(folder, "f" * 64) as store:
                # What it takes is right; the last line may be torn.
                assert store.values.items() <= expected.items()
                assert len(store.values) >= len(expected) - 1
                right += 1
        except DataError as error:
            errors += 1
            said = str(error)
        else:
            continue
        line = whole[:at].count(b"\n") + 1
        assert f"{path}, line {line} is no loss" in said
        assert "delete the line" in said
        assert path.read_bytes() == content  # nothing is lost
    print(f"{tries} tried, {errors} one clear error, {right} right, 0 wrong")
    assert errors > tries / 2


def test_altered_lines_are_one_clear_error(tmp_path: Path, seed_of: SeedOf) -> None:
    altered_lines(tmp_path, 200, seed_of(SEED))


@pytest.mark.slow
def test_many_altered_lines_are_one_clear_error(tmp_path: Path, seed_of: SeedOf) -> None:
    altered_lines(tmp_path, 3000, seed_of(SEED + 1))


def test_a_store_of_another_run_is_not_taken(tmp_path: Path) -> None:
    path = filled(tmp_path)
    shutil.copy(path, tmp_path / f"losses-{'e' * 16}.jsonl")
    with pytest.raises(DataError, match=r"line 1 is no loss .*checksum"), Store(tmp_path, "e" * 64):
        pass


@pytest.mark.parametrize("content", [b"my notes, no newline", b"\0\0\0", b"[1, 2]"])
def test_a_foreign_tail_is_not_cut(tmp_path: Path, content: bytes) -> None:
    path = filled(tmp_path)
    whole = path.read_bytes() + content
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"line 7 is no loss"), Store(tmp_path, "f" * 64):
        pass
    assert path.read_bytes() == whole


# --- a converted model --------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "cache" / "model"
    with keep(folder) as partial:
        (partial / "weights").write_bytes(random.Random(SEED).randbytes(100))
        (partial / "config.json").write_text("{}")
    return folder


def damages(folder: Path) -> Iterator[Callable[[], object]]:
    yield lambda: (folder / "weights").write_bytes(b"other")
    yield lambda: (folder / "weights").unlink()
    yield lambda: (folder / "tokenizer.json").write_text("{}")
    yield lambda: (folder / "config.json").rename(folder / "config")
    yield lambda: (folder / "link").symlink_to(folder / "weights")
    yield lambda: (folder / "sha256.json").unlink()
    yield lambda: (folder / "sha256.json").write_text("[")
    yield lambda: os.mkfifo(folder / "fifo")


@pytest.mark.parametrize("number", range(8))
def test_a_damaged_folder_is_made_again(kept: Path, number: int) -> None:
    assert is_intact(kept)
    list(damages(kept))[number]()
    with pytest.warns(CacheWarning, match=f"{kept} is damaged"):
        assert not is_intact(kept)
    with keep(kept) as partial:
        (partial / "weights").write_bytes(b"new")
    assert is_intact(kept)
    assert [path.name for path in kept.parent.iterdir()] == ["model"]
