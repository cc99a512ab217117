"""What MSD registers through official interfaces: no patch of vLLM or Transformers."""

from vllm_msd.vllm_plugin.configuration.hf_config import MSDCheckpointConfig

# Names start with "Eagle" so that vLLM's EAGLEConfig keeps them as they are.
DRAFT_ARCHITECTURES = {
    "llama": "EagleMsdLlamaForCausalLM",
    "qwen2": "EagleMsdQwen2ForCausalLM",
}
_DRAFT_MODULE = "vllm_msd.vllm_plugin.draft_model"


def register_models() -> None:
    """Make the draft classes known to vLLM and `model_type: msd` known to Transformers."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    AutoConfig.register(MSDCheckpointConfig.model_type, MSDCheckpointConfig, exist_ok=True)
    known = set(ModelRegistry.get_supported_archs())
    for architecture in DRAFT_ARCHITECTURES.values():
        if architecture not in known:
            ModelRegistry.register_model(architecture, f"{_DRAFT_MODULE}:{architecture}")
