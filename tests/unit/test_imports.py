"""The package's imports run one way: from the rooms that know more to those that know less.

Read from the sources, so imports inside functions count too, and nothing has to be installed.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each room may import those of its own line and of the lines above it.
ORDER = (
    ("",),  # the modules beside the rooms: errors, provenance, ...
    ("draft", "tree", "checkpoint", "kernels"),
    ("budget",),
    ("training", "roofline"),
    ("regenerate",),
    ("vllm_plugin",),
    ("measure",),
    ("demo",),
    ("bench",),
    ("cli",),
)
WITHOUT_VLLM = ("", "draft", "tree", "checkpoint", "kernels", "training", "roofline", "budget")
# What the package imports from beside it: commands that only work in a checkout, and say so.
IN_A_CHECKOUT = {
    ("vllm_msd.cli.demo_commands", "demo_factory.build"),
    ("vllm_msd.cli.demo_commands", "demo_factory.write_data"),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name; ``kernels/`` is ``vllm_msd.kernels``."""
    found = {}
    for folder, package in (("vllm_msd", "vllm_msd"), ("kernels", "vllm_msd.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def room(module: str) -> str:
    """The room a module of ours is in, "" for those beside the rooms."""
    second = module.split(".")[1:2]
    is_room = second and MODULES[".".join(["vllm_msd", *second])].name == "__init__.py"
    return second[0] if is_room else ""


def level(module: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room(module) in rooms)


def imports(tree: ast.AST, module: str, is_package: bool, everywhere: bool) -> Iterator[str]:
    """Dotted names that ``module`` imports; of ``from a import b`` the module that is meant.

    ``everywhere`` includes what is imported inside functions and for type checkers only.
    """
    pending = [tree]
    while pending:
        node = pending.pop()
        if not everywhere and (isinstance(node, FUNCTIONS) or _is_type_checking(node)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) + is_package - node.level] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name in MODULES else origin
        pending += ast.iter_child_nodes(node)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(module: str, everywhere: bool) -> set[str]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(imports(tree, module, path.name == "__init__.py", everywhere))


def test_every_room_has_a_place():
    assert len(MODULES) > 80
    missing = {room(module) for module in MODULES} - {room for line in ORDER for room in line}
    assert not missing, f"say in ORDER what these may import: {missing}"


@pytest.mark.parametrize("name", WITHOUT_VLLM)
def test_rooms_that_never_import_vllm(name):
    found = [
        (module, used)
        for module in MODULES
        if room(module) == name
        for used in imported(module, everywhere=True)
        if used.split(".")[0] == "vllm"
    ]
    assert not found


def test_nothing_is_imported_upward():
    upward = {
        (module, name)
        for module in MODULES
        for name in imported(module, everywhere=True)
        if name in MODULES and level(name) > level(module)
    }
    assert not upward


def test_the_package_imports_nothing_beside_it():
    """Neither tests nor benchmarks nor other folders of the repository."""
    beside = {path.parent.name for path in ROOT.glob("*/*.py")} - {"vllm_msd"}
    assert {"tests", "benchmarks", "kernels"} <= beside
    found = {
        (module, name)
        for module in MODULES
        for name in imported(module, everywhere=True)
        if name.split(".")[0] in beside
    }
    assert found == IN_A_CHECKOUT


def test_no_circles():
    """No module waits, while it is imported, for one that waits for it."""
    graph = {module: imported(module, everywhere=False) & MODULES.keys() for module in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert not graph, "these import each other, or are imported by such"


@pytest.mark.parametrize(
    ("source", "module", "everywhere", "expected"),
    [
        ("import vllm.config as c", "vllm_msd.tree.grow", False, {"vllm.config"}),
        ("from vllm_msd.tree import grow", "vllm_msd.draft.model", False, {"vllm_msd.tree.grow"}),
        ("from vllm_msd.tree import TreeConfig", "vllm_msd.errors", False, {"vllm_msd.tree"}),
        (
            "from .api import accept",
            "vllm_msd.kernels.accept",
            False,
            {"vllm_msd.kernels.accept.api"},
        ),
        (
            "from . import plan",
            "vllm_msd.training.data.index",
            False,
            {"vllm_msd.training.data.plan"},
        ),
        ("def f():\n    import vllm", "vllm_msd.errors", True, {"vllm"}),
        ("def f():\n    import vllm", "vllm_msd.errors", False, set()),
        ("if TYPE_CHECKING:\n    import vllm", "vllm_msd.errors", True, {"vllm"}),
        ("if TYPE_CHECKING:\n    import vllm", "vllm_msd.errors", False, set()),
        ("try:\n    import vllm\nfinally:\n    pass", "vllm_msd.errors", False, {"vllm"}),
    ],
)
def test_how_imports_are_read(source, module, everywhere, expected):
    is_package = MODULES[module].name == "__init__.py"
    assert set(imports(ast.parse(source), module, is_package, everywhere)) == expected
