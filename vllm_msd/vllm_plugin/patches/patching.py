"""How vLLM is patched: one frozen record for each replaced attribute.

A record names its target and the parameters the target must have in each supported version. All
records are checked, and all replacements made, before the first is put in place: a renamed or
changed patch point leaves vLLM untouched, with a message. The records themselves are in `ledger`.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_msd.errors import VLLM_MISSING, MSDError

SUPPORTED_VERSIONS = ("0.32", "0.33")
SUPPORTED_RANGE = f"{SUPPORTED_VERSIONS[0]}-{SUPPORTED_VERSIONS[-1]}"
_MARK = "__msd_patch__"
_WAY_OUT = (
    f"Install a vLLM in the range {SUPPORTED_RANGE}, or leave the speculative method 'msd' out: "
    "without it vLLM runs as if vllm-msd were not installed."
)


class PatchError(MSDError):
    """vLLM is not what a patch expects; the message names its version and the supported range."""


def vllm_version() -> str:
    """Version of the imported vLLM, such as `0.32.0`; PatchError when there is none."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise PatchError(VLLM_MISSING) from error

    return vllm.__version__


def minor_version(version: str) -> str:
    """`0.32` of `0.32.0+cpu`; a version that does not start with two numbers is returned as is."""
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def check_version(version: str | None = None) -> None:
    """Raise PatchError unless `version` (default: the imported vLLM) is supported."""
    version = vllm_version() if version is None else version
    if minor_version(version) not in SUPPORTED_VERSIONS:
        raise PatchError(f"vllm-msd supports vLLM {SUPPORTED_RANGE}, got {version}. {_WAY_OUT}")


def setup_failed(error: Exception) -> PatchError:
    """What to raise when MSD is asked for, where its set-up ended with an error nobody foresaw."""
    failed = PatchError(
        f"vllm-msd could not be set up with vLLM {vllm_version()} "
        f"({type(error).__name__}: {error}). Supported: vLLM {SUPPORTED_RANGE}. {_WAY_OUT}"
    )
    failed.__cause__ = error
    return failed


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of vLLM.

    Attributes:
        name: short name, unique in the ledger.
        target: `package.module:Class.attribute` or `package.module:attribute`.
        parameters: parameter names the target must have, by vLLM minor version (of a class: those
            of its `__init__`).
        make: `module:function`, called with the original; returns the replacement. Imported only
            when the patch is applied.
        what, why, remove_when: one sentence each, for the reader of the table.
        used_as: (module, text) pairs; the text must occur in that module's source, because the
            patch only works while vLLM looks the target up in this way.
    """

    name: str
    target: str
    parameters: Mapping[str, tuple[str, ...]]
    make: str
    what: str
    why: str
    remove_when: str
    used_as: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        module, _, path = self.target.partition(":")
        if not module.startswith("vllm") or not path:
            raise ValueError(f"patch {self.name}: target {self.target!r} is not 'vllm.module:name'")
        if set(self.parameters) != set(SUPPORTED_VERSIONS):
            raise ValueError(
                f"patch {self.name}: parameters for {sorted(self.parameters)}, "
                f"expected {list(SUPPORTED_VERSIONS)}"
            )
        if not (self.what and self.why and self.remove_when):
            raise ValueError(f"patch {self.name}: what, why and remove_when must be filled in")

    @property
    def module(self) -> str:
        """Dotted name of the vLLM module that holds the target."""
        return self.target.partition(":")[0]

    @property
    def path(self) -> tuple[str, ...]:
        """Attribute path inside the module."""
        return tuple(self.target.partition(":")[2].split("."))

    def _owner(self) -> Any:
        try:
            owner: Any = importlib.import_module(self.module)
            for part in self.path[:-1]:
                owner = getattr(owner, part)
        except (ImportError, AttributeError) as error:
            raise self._changed(f"{self.target} is missing ({error})") from error
        if self.path[-1] not in vars(owner):
            raise self._changed(f"{self.target} is missing")
        return owner

    def _changed(self, problem: str) -> PatchError:
        return PatchError(
            f"vllm-msd patch '{self.name}' does not fit vLLM {vllm_version()}: {problem}. "
            f"Supported: vLLM {SUPPORTED_RANGE}. {_WAY_OUT}"
        )

    def current(self) -> Any:
        """What vLLM holds at the target now (patched or not). PatchError when it is missing."""
        return _unwrap(vars(self._owner())[self.path[-1]])

    def is_applied(self) -> bool:
        """Whether the target is this patch's replacement."""
        return vars(self.current()).get(_MARK) == self.name

    def verify(self) -> None:
        """Check the unpatched target; PatchError when it is missing, changed or already patched."""
        current = self.current()
        if _MARK in vars(current):
            raise self._changed(
                f"{self.target} is already patched by '{vars(current)[_MARK]}'; "
                "a target is patched once"
            )
        expected = self.parameters[minor_version(vllm_version())]
        found = _parameters(current)
        if found != expected:
            raise self._changed(f"{self.target} takes {found}, expected {expected}")
        for module, text in self.used_as:
            if text not in _source_of(module):
                raise self._changed(f"{module} no longer contains {text!r}")

    def replacement(self) -> Any:
        """Verify the target and make what takes its place; PatchError as in `verify`."""
        self.verify()
        module, _, function = self.make.partition(":")
        make: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
        replacement = make(self.current())
        setattr(replacement, _MARK, self.name)
        return replacement

    def put(self, replacement: Any) -> None:
        """Put what `replacement` made in the target's place."""
        replace_attribute(self._owner(), self.path[-1], lambda _: replacement)


def prepare(patches: tuple[Patch, ...]) -> list[tuple[Patch, Any]]:
    """Verify what is not in place yet and make its replacements; vLLM is not changed.

    Raises:
        PatchError: a target is missing or changed.
    """
    pending = [patch for patch in patches if not patch.is_applied()]
    return [(patch, patch.replacement()) for patch in pending]


def put_in_place(ready: list[tuple[Patch, Any]]) -> None:
    """Change vLLM: all that `prepare` returned."""
    for patch, replacement in ready:
        patch.put(replacement)


def replace_attribute(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(original)`` in an attribute's place; a method of any kind, or a property, stays
    what it is.
    """
    stored = vars(owner)[name]
    replacement = make(_unwrap(stored))
    if isinstance(stored, staticmethod | classmethod | property):
        replacement = type(stored)(replacement)
    setattr(owner, name, replacement)


def check_source(root: Path, version: str, patches: tuple[Patch, ...]) -> list[str]:
    """Compare the records with unpacked Python files, importing nothing.

    Args:
        root: folder that holds `vllm/`.
        version: vLLM version of these files.

    Returns:
        one line for each patch point that is missing or changed; empty when all is well.
    """
    problems = []
    for patch in patches:
        found = _parameters_in_source(_read_module(root, patch.module), patch.path)
        expected = patch.parameters[minor_version(version)]
        if found is None:
            problems.append(f"{patch.name}: {patch.target} is missing")
        elif found != expected:
            problems.append(f"{patch.name}: {patch.target} takes {found}, expected {expected}")
        for module, text in patch.used_as:
            if text not in _read_module(root, module):
                problems.append(f"{patch.name}: {module} no longer contains {text!r}")
    return problems


def _unwrap(stored: Any) -> Any:
    if isinstance(stored, property):
        return stored.fget
    return stored.__func__ if isinstance(stored, staticmethod | classmethod) else stored


def _parameters(target: Any) -> tuple[str, ...]:
    function = target.__init__ if inspect.isclass(target) else target
    return tuple(inspect.signature(function).parameters)


@functools.cache
def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")


def _read_module(root: Path, module: str) -> str:
    base = root.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


def _parameters_in_source(source: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
    """Parameter names of a function or of a class's `__init__`, None when there is none."""
    body: list[ast.stmt] = ast.parse(source).body
    for name in (*path, "__init__"):
        node = next((n for n in body if getattr(n, "name", None) == name), None)
        if isinstance(node, ast.FunctionDef):
            a = node.args
            names = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
            return tuple(arg.arg for arg in names if arg is not None)
        if node is None:
            return None
        body = node.body
    return None


def version_in_source(root: Path) -> str:
    match = re.search(
        r"^__version__ = version = '([^']+)'", _read_module(root, "vllm._version"), re.M
    )
    if match is None:
        raise SystemExit(f"no vLLM version found in {root}: give it with --version")
    return match.group(1)
