"""Draft checkpoints: read the published layouts and our own, write our own.

``files.py`` finds a checkpoint's files, ``weights.py`` reads tensors and their headers,
``store.py`` loads, saves and converts, ``trim.py`` gives a draft a vocabulary of its own,
``inspect.py`` describes, ``fit.py`` compares a draft with a target.
"""

from vllm_msd.checkpoint.fit import check_draft_fits_target, check_draft_sizes
from vllm_msd.checkpoint.inspect import inspect_draft
from vllm_msd.checkpoint.store import (
    convert_draft,
    load_draft,
    load_draft_config,
    load_draft_vocabulary,
    save_draft,
)
from vllm_msd.checkpoint.trim import with_vocabulary

__all__ = [
    "check_draft_fits_target",
    "check_draft_sizes",
    "convert_draft",
    "inspect_draft",
    "load_draft",
    "load_draft_config",
    "load_draft_vocabulary",
    "save_draft",
    "with_vocabulary",
]
