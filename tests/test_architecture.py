"""Imports point one way, and the pure rooms know only the nouns."""

import ast
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest

import grokquant
from grokquant.containers import CONTAINERS, container_of
from grokquant.containers.container import Container
from grokquant.formats import FORMATS, READ_ONLY
from grokquant.formats.format import ReadableFormat
from grokquant.sources import SOURCE_KINDS
from grokquant.sources.kind import SourceKind

ROOT = Path(grokquant.__file__).parent
# From the bottom up; a module may import its own room and those below.
ROOMS = [
    {"errors", "version", "humanize", "escaping", "memory", "grids"},
    {"types", "devices", "amx", "threads", "parallel", "files"},
    {"methods"},
    {"recipe", "sources"},
    {"families", "formats", "containers", "toy", "engines"},
    {"checkpoint", "calibration"},
    {"text", "streaming"},
    {"job", "runtime", "vllm_plugin"},
    {"evaluation"},
    {"reporting"},
    {"__init__"},
    {"cli", "lm_eval"},
    {"__main__"},
]


def imports() -> list[tuple[str, str]]:
    """(module, imported module) inside the package, as paths without suffix."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found += [(module, name) for name in names if name.startswith("grokquant.")]
    return found


def level(room: str) -> int:
    return next(index for index, rooms in enumerate(ROOMS) if room in rooms)


@pytest.mark.parametrize(("module", "imported"), imports())
def test_imports_point_down(module: str, imported: str):
    room, other = module.split("/")[0], imported.split(".")[1]
    assert level(other) <= level(room), f"{module} imports {imported}"


@pytest.mark.parametrize("room", ["methods", "formats"])
def test_methods_and_formats_know_only_the_nouns(room: str):
    allowed = {room, "errors", "grids", "types", "threads", "version"}
    others = {imported.split(".")[1] for module, imported in imports() if module.startswith(room)}
    assert others <= allowed


def test_every_room_is_in_the_picture():
    rooms = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    named = set().union(*ROOMS)
    assert rooms == named
    picture = (ROOT.parent / "ARCHITECTURE.md").read_text()
    assert [room for room in named - {"__init__", "__main__"} if room not in picture] == []


@pytest.mark.parametrize(
    ("room", "row", "table"),
    [
        ("formats", ReadableFormat, [*FORMATS.values(), *READ_ONLY.values()]),
        ("containers", Container, [*CONTAINERS.values(), container_of("bf16")]),
        ("sources", SourceKind, SOURCE_KINDS),
    ],
)
def test_what_a_module_offers_is_in_the_table_of_its_room(room: str, row: type, table: Iterable):
    stems = [path.stem for path in (ROOT / room).glob("[!_]*.py")]
    modules = [import_module(f"grokquant.{room}.{stem}") for stem in stems]
    offered = [value for module in modules for value in vars(module).values()]
    assert {id(value) for value in offered if isinstance(value, row)} == {id(row) for row in table}


def test_no_file_is_a_symbolic_link():
    """Windows checks them out as text files."""
    rooms = ("docs", "eval", "grokquant", "notebooks", "recipes", "tests")
    found = [path for room in rooms for path in (ROOT.parent / room).rglob("*")]
    assert found and [path for path in found if path.is_symlink()] == []
