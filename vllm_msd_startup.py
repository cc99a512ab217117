"""The start-up hook: setup.py makes the one line of ``vllm_msd_startup.pth`` of this file.

Python runs it whenever an interpreter of the environment starts, so it imports nothing of ours
unless ``vllm_msd.compat`` has something to mend; what and why is said there. ``from_checkout`` is
given to it: whether the installation is an editable one.
"""

import os
import sys


def torch_knows_accelerator():
    """Read from ``torch/version.py``; False where there is no torch, or none on the path yet."""
    for folder in sys.path:
        try:
            with open(folder + "/torch/version.py") as file:
                lines = file.readlines()
        except OSError:
            continue
        # "cuda: Optional[str] = '13.0'", or None
        settings = {line.partition(":")[0]: line.partition("=")[2].strip() for line in lines}
        return any(settings.get(name, "None") != "None" for name in ("cuda", "hip", "xpu"))
    return False


try:
    if not torch_knows_accelerator():
        from vllm_msd import compat

        compat.install()
    if from_checkout or os.path.exists("kernels/tree_attention"):  # noqa: F821
        from vllm_msd import compat

        compat.pass_over_checkout()
except Exception as error:
    problem = f"{type(error).__name__}: {error}; reinstall or uninstall vllm-msd"
    print(f"vllm-msd: start-up hook skipped ({problem})", file=sys.stderr)
