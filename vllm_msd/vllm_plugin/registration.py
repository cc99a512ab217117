"""What MSD registers through official interfaces: no patch of vLLM or Transformers."""

from typing import Any

from vllm_msd.vllm_plugin.configuration.hf_config import MSDCheckpointConfig

# Names start with "Eagle" so that vLLM's EAGLEConfig keeps them as they are.
DRAFT_ARCHITECTURES = {
    "llama": "EagleMsdLlamaForCausalLM",
    "qwen2": "EagleMsdQwen2ForCausalLM",
}
_DRAFT_MODULE = "vllm_msd.vllm_plugin.draft_model"


def register_models() -> None:
    """Make the draft classes known to vLLM and `model_type: msd` known to Transformers.

    And `speculators_model_type: msd` to vLLM, by which a draft is served by its own name.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils.configs.speculators.algos import register_speculator

    AutoConfig.register(MSDCheckpointConfig.model_type, MSDCheckpointConfig, exist_ok=True)
    known = set(ModelRegistry.get_supported_archs())
    for architecture in DRAFT_ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{_DRAFT_MODULE}:{architecture}")
    register_speculator(MSDCheckpointConfig.model_type)(read_speculators_config)


def read_speculators_config(
    config_dict: dict[str, Any], pre_trained_config: dict[str, Any]
) -> None:
    """What vLLM calls for a draft in the speculators library's form, without a `model_type`.

    Args:
        config_dict: the content of its ``config.json``.
        pre_trained_config: what vLLM makes its config of, changed in place.
    """
    pre_trained_config["speculators_model_type"] = config_dict["speculators_model_type"]
    pre_trained_config["architectures"] = [DRAFT_ARCHITECTURES[config_dict["layer_type"]]]
