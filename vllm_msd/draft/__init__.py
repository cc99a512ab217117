"""The MSD draft model in plain PyTorch: no vLLM import, trainable, checked against reference
vectors.

``model.py`` holds the draft and its two branches, ``layers.py`` the decoder layer, ``cache.py`` the
KV cache, ``shift.py`` turns a target's prompt into draft rows, ``vocabulary.py`` is about the
tokens it proposes, ``config.py`` describes the shapes.
"""

from vllm_msd.draft.cache import DraftCache
from vllm_msd.draft.config import MSDDraftConfig, TargetInfo
from vllm_msd.draft.model import MSDDraft, TextBranch, VisualBranch
from vllm_msd.draft.shift import DraftRows, shift

__all__ = [
    "DraftCache",
    "DraftRows",
    "MSDDraft",
    "MSDDraftConfig",
    "TargetInfo",
    "TextBranch",
    "VisualBranch",
    "shift",
]
