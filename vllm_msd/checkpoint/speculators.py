"""What a draft's config says in the form of the speculators library, which vLLM reads.

With it ``vllm serve DRAFT`` finds the target by itself: vLLM takes the target's name, the method
and the number of tokens from ``speculators_config``.
"""

from pathlib import Path
from typing import Any

from vllm_msd.checkpoint.files import target_place
from vllm_msd.draft import MSDDraftConfig

_LAYER_FIELDS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_hidden_layers", "rms_norm_eps", "vocab_size", "max_position_embeddings", "attention_bias",
    "hidden_act", "torch_dtype",
)  # fmt: skip


def speculators_fields(config: MSDDraftConfig, folder: Path) -> dict[str, Any]:
    """Further keys of ``config.json``; none where the target's name means nothing to vLLM.

    That is where none is recorded, or a path relative to the draft's folder: such a pair may be
    moved, and the target's draft is found by vllm-msd.

    Args:
        config: of the draft.
        folder: of the draft.
    """
    name = config.target.name_or_path
    if name is None or not (Path(name).is_absolute() or target_place(folder, name) == name):
        return {}
    architecture = config.target.architecture
    layer = {"model_type": config.layer_type, "rope_theta": config.rope_theta}
    layer |= {name: getattr(config, name) for name in _LAYER_FIELDS}
    return {
        "speculators_model_type": "msd",
        "speculators_config": {
            "algorithm": "msd",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": config.num_speculative_tokens}
            ],
            "verifier": {
                "name_or_path": name,
                "architectures": [] if architecture is None else [architecture],
            },
        },
        "transformer_layer_config": layer,
    }
