"""The ledger of patches against the installed vLLM, other versions' sources, and the docs.

Set MSD_VLLM_SOURCE to a folder that holds another version's `vllm/` (Python files are enough) to
check that version's patch points as well.
"""

import functools
import inspect
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_msd.vllm_plugin import plugin
from vllm_msd.vllm_plugin.patches import ledger as patches
from vllm_msd.vllm_plugin.patches import patching
from vllm_msd.vllm_plugin.patches.__main__ import main as patches_main
from vllm_msd.vllm_plugin.patches.patching import Patch, PatchError

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"
PACKAGE = Path(patching.__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture
def fake_vllm(monkeypatch):
    """A module of `vllm` with one function and one class to patch."""
    module = types.ModuleType("vllm.msd_test_module")

    def function(a, b):
        return a + b

    class Thing:
        def __init__(self, config, device=None):
            self.config = config

        @staticmethod
        def build(value):
            return value

        @property
        def size(self):
            return 3

    module.function, module.Thing = function, Thing
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def double(original):
    """A replacement maker for the tests below."""

    @functools.wraps(original)
    def doubled(*args):
        return 2 * original(*args)

    return doubled


def subclass(original):
    return type(original.__name__, (original,), {"extra": True})


def record(path="function", parameters=("a", "b"), make="double", **kwargs) -> Patch:
    return Patch(
        name="test",
        target=f"vllm.msd_test_module:{path}",
        parameters=dict.fromkeys(patching.SUPPORTED_VERSIONS, parameters),
        make=f"{__name__}:{make}",
        what="w",
        why="w",
        remove_when="w",
        **kwargs,
    )


def apply(*records: Patch) -> None:
    patching.put_in_place(patching.prepare(records))


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda p: p.name)
def test_every_patch_is_in_place(patch):
    assert patch.is_applied()
    with pytest.raises(PatchError, match="patched once"):
        patch.replacement()


def test_names_and_targets_are_unique():
    assert len({p.name for p in patches.PATCHES}) == len(patches.PATCHES)
    assert len({p.target for p in patches.PATCHES}) == len(patches.PATCHES)


def test_registering_again_changes_nothing():
    before = [patch.current() for patch in patches.PATCHES]
    plugin.register()
    assert all(patch.current() is was for patch, was in zip(patches.PATCHES, before, strict=True))


def test_no_unlisted_patches():
    """Nothing of this package sits in vLLM's modules or classes but what the ledger lists."""
    assert set(_replaced_in_vllm()) == {p.target for p in patches.PATCHES}


def test_unlisted_patch_is_noticed(monkeypatch):
    import vllm.engine.arg_utils as arg_utils

    monkeypatch.setattr(arg_utils, "get_kwargs", patching.minor_version)
    monkeypatch.setattr(arg_utils.EngineArgs, "create_model_config", patching.minor_version)
    assert {
        "vllm.engine.arg_utils:get_kwargs",
        "vllm.engine.arg_utils:EngineArgs.create_model_config",
    } <= set(_replaced_in_vllm())


def _replaced_in_vllm() -> set[str]:
    """`module:path` of every attribute of an imported vLLM module that this package's code made.

    A replacement that another module has imported by name counts as the one patch that it is.
    """
    found = set()
    for name, module in list(sys.modules.items()):
        if name != "vllm" and not name.startswith("vllm."):
            continue
        for attribute, value in list(vars(module).items()):
            if _ours(value):
                found.add(_patch_target(value) or f"{name}:{attribute}")
            elif inspect.isclass(value) and value.__module__ == name:
                for member, stored in list(vars(value).items()):
                    inner = patching._unwrap(stored)
                    if _ours(inner):
                        found.add(_patch_target(inner) or f"{name}:{attribute}.{member}")
    return found


def _patch_target(value) -> str | None:
    return next((p.target for p in patches.PATCHES if p.current() is value), None)


def _ours(value) -> bool:
    if inspect.isfunction(value):  # functools.wraps copies the module's name, not the code
        return Path(value.__code__.co_filename).is_relative_to(PACKAGE)
    return inspect.isclass(value) and (
        value.__module__.startswith("vllm_msd") or patching._MARK in vars(value)
    )


def test_replacement_keeps_kind_and_original(fake_vllm):
    apply(record("function"))
    assert fake_vllm.function(1, 2) == 6
    apply(record("Thing.build", ("value",)))
    assert isinstance(vars(fake_vllm.Thing)["build"], staticmethod)
    assert fake_vllm.Thing.build(4) == 8
    apply(record("Thing.size", ("self",)))
    assert isinstance(vars(fake_vllm.Thing)["size"], property)
    assert fake_vllm.Thing(None).size == 6


def test_class_target_is_checked_by_its_constructor(fake_vllm):
    original = fake_vllm.Thing
    with pytest.raises(PatchError, match="expected"):
        apply(record("Thing", ("self", "config"), make="subclass"))
    apply(record("Thing", ("self", "config", "device"), make="subclass"))
    assert issubclass(fake_vllm.Thing, original) and fake_vllm.Thing.extra


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        (record(parameters=("a",)), r"takes \('a', 'b'\), expected \('a',\)"),
        (record("gone"), "vllm.msd_test_module:gone is missing"),
        (record("Thing.gone"), r"vllm.msd_test_module:Thing\.gone is missing"),
        (replace(record(), target="vllm.no_such_module:x"), "no_such_module:x is missing"),
        (record(used_as=(("vllm.engine.arg_utils", "no such line"),)), "no longer contains"),
    ],
    ids=["parameters", "function", "method", "module", "call site"],
)
def test_missing_or_changed_point_is_loud(fake_vllm, patch, problem):
    """The message names the vLLM version, the supported range and a way out; nothing is applied."""
    function = fake_vllm.function
    good = replace(record("Thing.build", ("value",)), name="good")
    with pytest.raises(PatchError, match=problem) as caught:
        apply(good, patch)
    message = str(caught.value)
    assert patching.vllm_version() in message
    assert patching.SUPPORTED_RANGE in message and "leave the speculative method 'msd'" in message
    assert fake_vllm.function is function and not good.is_applied()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "dev"])
def test_other_vllm_versions_are_refused(monkeypatch, version):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(PatchError, match=f"supports vLLM 0.32-0.33, got {version}"):
        patching.check_version()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.1", "0.33.0.dev3"])
def test_supported_versions(version):
    patching.check_version(version)


def test_record_must_be_complete():
    with pytest.raises(ValueError, match="what, why and remove_when"):
        replace(record(), why="")
    with pytest.raises(ValueError, match="parameters for"):
        replace(record(), parameters={"0.32": ()})
    with pytest.raises(ValueError, match=r"vllm\.module:name"):
        replace(record(), target="torch.nn:Module")


def test_installed_source_says_the_same():
    import vllm

    root = Path(vllm.__file__).parents[1]
    assert patching.check_source(root, patching.vllm_version(), patches.PATCHES) == []


def test_source_check_sees_changes(tmp_path):
    module = tmp_path / "vllm" / "msd_test_module.py"
    module.parent.mkdir()
    module.write_text("class Thing:\n    def __init__(self, config): ...\n")
    good = record("Thing", ("self", "config"))
    bad = [
        record("Thing", ("self",)),
        record("function"),
        replace(good, used_as=(("vllm.msd_test_module", "nothing"),)),
    ]
    assert patching.check_source(tmp_path, "0.32.0", (good,)) == []
    assert len(patching.check_source(tmp_path, "0.32.0", tuple(bad))) == 3


def test_source_of_an_unsupported_version_is_a_wrong_argument(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        patches_main(["--check-source", str(tmp_path), "--version", "0.40.0"])
    assert "supports vLLM 0.32-0.33, got 0.40.0" in capsys.readouterr().err


@pytest.mark.skipif("MSD_VLLM_SOURCE" not in os.environ, reason="MSD_VLLM_SOURCE is not set")
def test_other_versions_source(capsys):
    assert patches_main(["--check-source", os.environ["MSD_VLLM_SOURCE"]]) == 0, capsys.readouterr()


def test_documentation_lists_the_patches():
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert patches.markdown_table() in text, (
        "docs/architecture.md is out of date: replace its table by the output of "
        "python -m vllm_msd.vllm_plugin.patches"
    )
