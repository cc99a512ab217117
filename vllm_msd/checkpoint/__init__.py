"""Draft checkpoints: read the published layouts and our own, write our own.

``files.py`` finds a checkpoint's files, ``weights.py`` reads tensors and their headers,
``store.py`` loads, saves and converts, ``inspect.py`` describes, ``fit.py`` compares a draft with
a target.
"""

from vllm_msd.checkpoint.fit import check_draft_fits_target, check_draft_sizes
from vllm_msd.checkpoint.inspect import inspect_draft
from vllm_msd.checkpoint.store import convert_draft, load_draft, load_draft_config, save_draft

__all__ = [
    "check_draft_fits_target",
    "check_draft_sizes",
    "convert_draft",
    "inspect_draft",
    "load_draft",
    "load_draft_config",
    "save_draft",
]
