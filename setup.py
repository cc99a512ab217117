"""What pyproject.toml cannot say: ``kernels/`` is ``vllm_msd.kernels``, and a start-up hook.

The hook is a ``.pth`` file, which must land directly in site-packages for ordinary and editable
installs alike; setuptools has no setting for that. Python runs such a file's lines that start with
``import``, so the code of ``vllm_msd_startup.py`` becomes one such line.
"""

import ast
import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

STARTUP_HOOK = "vllm_msd_startup.pth"


def hook_line(from_checkout: bool) -> str:
    """The start-up hook as a line of a ``.pth`` file."""
    module = ast.parse(Path(STARTUP_HOOK).with_suffix(".py").read_text(encoding="utf-8"))
    code = ast.unparse(ast.Module(module.body[1:], type_ignores=[]))  # without the docstring
    return f"import sys; exec({code!r}, {{'from_checkout': {from_checkout}}})\n"


class BuildPyWithHook(build_py):
    """Ordinary wheels: put the hook beside the packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            hook = Path(self.build_lib) / STARTUP_HOOK
            hook.write_text(hook_line(from_checkout=False), encoding="utf-8")

    def get_outputs(self, include_bytecode=True):
        hook = [] if self.editable_mode else [str(Path(self.build_lib) / STARTUP_HOOK)]
        return [*super().get_outputs(include_bytecode), *hook]


class EditableWheelWithHook(editable_wheel):
    """Editable wheels hold only links to the sources: add the hook and its RECORD line."""

    def run(self):
        super().run()
        (wheel,) = Path(self.dist_dir).glob("vllm_msd-*editable*.whl")
        add_to_wheel(wheel, STARTUP_HOOK, hook_line(from_checkout=True).encode())


def add_to_wheel(wheel: Path, name: str, content: bytes) -> None:
    """Rewrite ``wheel`` with a file ``name`` at its top level, listed in RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    grown = wheel.with_suffix(".grown")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(grown, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr(name, content)
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data = f"{name},sha256={digest},{len(content)}\n".encode() + data
            new.writestr(item, data)
    grown.replace(wheel)


kernels = ["vllm_msd.kernels", *(f"vllm_msd.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["vllm_msd", "vllm_msd.*"]), *kernels],
    package_dir={"vllm_msd.kernels": "kernels"},
    cmdclass={"build_py": BuildPyWithHook, "editable_wheel": EditableWheelWithHook},
)
