"""What pyproject.toml cannot say: ``kernels/`` is ``vllm_msd.kernels``, and a start-up hook.

The hook is a ``.pth`` file, which must land directly in site-packages for ordinary and editable
installs alike; setuptools has no setting for that.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

STARTUP_HOOK = "vllm_msd_startup.pth"


class BuildPyWithHook(build_py):
    """Ordinary wheels: put the hook beside the packages."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(STARTUP_HOOK, str(Path(self.build_lib) / STARTUP_HOOK))

    def get_outputs(self, include_bytecode=True):
        hook = [] if self.editable_mode else [str(Path(self.build_lib) / STARTUP_HOOK)]
        return [*super().get_outputs(include_bytecode), *hook]


class EditableWheelWithHook(editable_wheel):
    """Editable wheels hold only links to the sources: add the hook and its RECORD line."""

    def run(self):
        super().run()
        (wheel,) = Path(self.dist_dir).glob("vllm_msd-*editable*.whl")
        add_to_wheel(wheel, STARTUP_HOOK)


def add_to_wheel(wheel: Path, name: str) -> None:
    """Rewrite ``wheel`` with the file ``name`` at its top level, listed in RECORD."""
    content = Path(name).read_bytes()
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
