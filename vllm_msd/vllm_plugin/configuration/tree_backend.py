"""Which attention backend an engine with draft trees runs on: the user's, or vLLM's choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_msd.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

# Attention backends that trees go with on a GPU: ours around them needs their KV cache's layout.
TREE_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


def tree_attention_backend(
    engine_args: EngineArgs, request: Mapping[str, Any], target: ModelConfig
) -> Any:
    """The attention backend around which trees attend, None where there is only one.

    The one that was asked for; else FLASH_ATTN where vLLM would choose it, and TRITON_ATTN
    otherwise. A float8 cache takes TRITON_ATTN: FLASH_ATTN wants float8 queries with it.

    Raises:
        ConfigError: another one was asked for, two different ones, or FLASH_ATTN with float8.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not current_platform.is_cuda():
        return None
    attention = engine_args.attention_config
    asked = {
        "attention_backend": engine_args.attention_backend or attention.backend,
        **{
            f"attention_config.backend_per_kind[{kind!r}]": backend
            for kind, backend in (attention.backend_per_kind or {}).items()
        },
        "speculative_config['attention_backend']": request.get("attention_backend"),
    }
    names = {key: getattr(value, "name", value) for key, value in asked.items() if value}
    either, chain = " or ".join(TREE_BACKENDS), "or draft a chain: set tree_top_k to 1."
    for key, name in names.items():
        if name not in TREE_BACKENDS:
            raise ConfigError(
                f"{key}: got {name}, but draft trees on a GPU need {either}, which keep the KV "
                f"cache as the tree kernel reads it. Leave it out, {chain}"
            )
    if len(set(names.values())) > 1:
        given = ", ".join(f"{key} {name}" for key, name in names.items())
        raise ConfigError(
            f"got {given}: with draft trees the draft attends as the target does. Name one, {chain}"
        )
    float8 = str(engine_args.kv_cache_dtype).startswith("fp8")
    chosen = next(iter(names.values()), None)
    if chosen is None:
        chosen = "TRITON_ATTN" if float8 else _usual_attention_backend(engine_args, target)
    elif chosen == "FLASH_ATTN" and float8:
        raise ConfigError(
            f"{next(iter(names))}: got FLASH_ATTN with kv_cache_dtype "
            f"{engine_args.kv_cache_dtype!r}. There its queries are float8 too, which the tree "
            f"kernel does not take. Leave it out (TRITON_ATTN), {chain}"
        )
    return AttentionBackendEnum[chosen]


def _usual_attention_backend(engine_args: EngineArgs, target: ModelConfig) -> str:
    """FLASH_ATTN if vLLM would take it for this target on this machine, else TRITON_ATTN."""
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import AttentionSelectorConfig

    cache_type = engine_args.kv_cache_dtype
    wanted = AttentionSelectorConfig(
        head_size=target.get_head_size(),
        dtype=target.dtype,
        kv_cache_dtype=cache_type,
        block_size=engine_args.block_size,
        use_mm_prefix=target.is_mm_prefix_lm,
    )
    path = current_platform.get_attn_backend_cls(None, attn_selector_config=wanted)
    name = resolve_obj_by_qualname(path).get_name()
    return name if name in TREE_BACKENDS else "TRITON_ATTN"
