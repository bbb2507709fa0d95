"""Who may import whom, what the wheel holds, how large files are, how many names are public."""

from __future__ import annotations

import ast
import shutil
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxquant
from benchmarks import rooms_table
from tests.processes import finished

ROOT = Path(__file__).parent.parent
# Each room may import the rooms before it and its own members.
ORDER = (
    *("errors", "files", "formats", "schemes", "numerics", "numerics.kernels", "ir", "run"),
    *("structure", "pipeline", "frontends", "passes", "recipes", "analysis.inspection", "analysis"),
    *("checkpoint", "exports", "evaluation", "cli"),
)
RANK = {name: rank for rank, name in enumerate(ORDER)}
ENTRY_POINTS = (
    "fxquant",
    "fxquant.cli.__main__",
    "fxquant.evaluation.__main__",
)  # may import whatever is public
# What a room may take from outside, beside torch and the standard library.
LIBRARIES: dict[str, frozenset[str]] = {
    "files": frozenset({"safetensors"}),
    "formats": frozenset(),
    "schemes": frozenset(),
    "numerics": frozenset(),
    "numerics.kernels": frozenset({"triton"}),
    "ir": frozenset({"safetensors"}),
    "structure": frozenset(),
    "pipeline": frozenset({"tqdm"}),
    "passes": frozenset({"tqdm"}),
}


def sources(root: Path = ROOT) -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of the library; links are not followed."""
    for folder, package in (
        ("fxquant", "fxquant"),
        ("passes", "fxquant.passes"),
        ("evaluation", "fxquant.evaluation"),
    ):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if folder == "fxquant" and parts[0] in ("passes", "evaluation"):
                continue  # the same files through their links
            name = ".".join((package, *parts)).removesuffix(".__init__")
            yield name, path


MODULES = dict(sources())


def room(module: str) -> str:
    """The room of a module: one inside another, where the order names it, or the outer one."""
    inner = ".".join(module.split(".")[1:3])
    return inner if inner in RANK else module.split(".")[1]


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every import statement, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield (full, "") if full in MODULES else (module, alias.name)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def library_names() -> list[str]:
    return [name for name in MODULES if name not in ENTRY_POINTS]


@pytest.mark.parametrize("name", library_names())
def test_imports_point_downwards(name: str) -> None:
    assert room(name) in RANK, f"{name} stands in no room of the order"
    for module, taken in imports(MODULES[name]):
        if module == "fxquant":
            pytest.fail(f"{name} takes {taken} from the top, which imports every room")
        if module.startswith("fxquant."):
            assert RANK[room(module)] <= RANK[room(name)], f"{name} imports {module}"


def test_no_import_circle() -> None:
    below = {
        name: {module for module, _ in imports(path) if module in MODULES}
        for name, path in MODULES.items()
    }
    while leaves := [name for name, needs in below.items() if not needs]:
        for name in leaves:
            del below[name]
        for needs in below.values():
            needs.difference_update(leaves)
    assert not below, f"a circle among {sorted(below)}"


@pytest.mark.parametrize("name", library_names())
def test_rooms_know_only_what_they_may(name: str) -> None:
    taken = {module.split(".")[0] for module, _ in imports(MODULES[name])}
    if room(name) != "cli":
        assert "argparse" not in taken
    if (allowed := LIBRARIES.get(room(name))) is not None:
        outside = taken - set(sys.stdlib_module_names) - {"torch", "fxquant"}
        assert outside <= allowed, f"{name} imports {sorted(outside - allowed)}"


def test_checkpoint_imports_no_pass() -> None:
    for name in MODULES:
        if name.startswith("fxquant.checkpoint"):
            found = [m for m, _ in imports(MODULES[name]) if m.startswith("fxquant.passes")]
            assert not found, f"{name} imports {found}"


def test_a_pass_a_file() -> None:
    """Each file of passes/ holds what its name says and is on the package's face."""
    face = {n for _, n in imports(MODULES["fxquant.passes"]) if n}
    for name, path in MODULES.items():
        if name == "fxquant.passes" or not name.startswith("fxquant.passes."):
            continue
        classes = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)}
        spelled = name.rpartition(".")[2].replace("_", "")
        public = {c for c in classes if c in face}
        assert {c.lower() for c in public} == {spelled}, f"{name} holds {sorted(public)}"


def test_the_front_of_the_house_is_short() -> None:
    shown = [
        path.name
        for path in (ROOT / "fxquant").iterdir()
        if not path.is_symlink() and path.name not in ("__pycache__", "py.typed")
    ]
    assert len(shown) <= 16, sorted(shown)


@pytest.mark.parametrize("name", [n for n, p in MODULES.items() if p.name == "__init__.py"])
def test_each_room_says_what_it_is(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert text, f"{name} has no docstring"
    if name != "fxquant":
        assert len(text.splitlines()) >= 2, f"{name}: who may call it, what may it not know?"


@pytest.mark.parametrize("name", list(MODULES))
def test_files_and_functions_fit(name: str) -> None:
    text = MODULES[name].read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{name}.{node.name} has {length} lines"


def test_public_names_are_few() -> None:
    code = ast.parse((ROOT / "fxquant" / "__init__.py").read_text())
    names = [a.asname for n in ast.walk(code) if isinstance(n, ast.ImportFrom) for a in n.names]
    assert None not in names
    assert len(names) <= 20
    assert all(hasattr(fxquant, name) for name in names if name)


def packages(root: Path) -> set[str]:
    return {name for name, path in sources(root) if path.name == "__init__.py"}


def declared(root: Path) -> set[str]:
    data = tomllib.loads((root / "pyproject.toml").read_text())
    return set(data["tool"]["setuptools"]["packages"])


def test_every_package_is_declared() -> None:
    assert declared(ROOT) == packages(ROOT)


def test_folders_with_code_are_packages() -> None:
    for _, path in sources():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    copy = tmp_path / "checkout"  # setuptools leaves build folders behind
    copy.mkdir()
    for folder in ("fxquant", "passes", "evaluation"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def wheel_of(checkout: Path) -> list[str]:
    """Names of the files that a wheel of the checkout holds."""
    out = checkout.parent / "dist"
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    done = finished([*build, "--outdir", str(out), str(checkout)])
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return sorted(n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n)


def expected_in_wheel(root: Path) -> list[str]:
    files = [
        f"{name.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for name, path in sources(root)
    ]
    page = root / "evaluation" / "report" / "page"
    files += [f"fxquant/{p.relative_to(root)}" for p in page.rglob("*") if p.is_file()]
    return sorted([*files, "fxquant/py.typed"])


def test_wheel_holds_each_file_once(checkout: Path) -> None:
    assert wheel_of(checkout) == expected_in_wheel(checkout)


def test_a_forgotten_package_is_noticed(checkout: Path) -> None:
    """What guards the wheel fails where a folder is not declared."""
    planted = checkout / "fxquant" / "numerics" / "forgotten"
    planted.mkdir()
    (planted / "__init__.py").write_text('"""Planted."""\n')
    assert packages(checkout) - declared(checkout) == {"fxquant.numerics.forgotten"}
    missing = set(expected_in_wheel(checkout)) - set(wheel_of(checkout))
    assert missing == {"fxquant/numerics/forgotten/__init__.py"}


def test_the_map_shows_every_room() -> None:
    """``python -m benchmarks.rooms_table`` writes docs/README.md's table from the docstrings."""
    page = rooms_table.PAGE.read_text(encoding="utf-8")
    assert rooms_table.rendered(page) == page
    shown = {room.removeprefix("../").replace("/", ".") for room in rooms_table.ROOMS}
    assert shown == {name.removeprefix("fxquant.") for name in packages(ROOT)} - {"fxquant"}
