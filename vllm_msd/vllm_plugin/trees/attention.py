"""How trees reach the attention backends of both runners: on vLLM's attention metadata."""

from __future__ import annotations

from typing import Any

from vllm_msd.tree import TreeRows

ATTRIBUTE = "msd_tree"  # the attribute of vLLM's attention metadata that carries the trees


def attach(attn_metadata: dict[str, Any], tree: TreeRows | None) -> None:
    """Hand the trees to every layer's metadata object; None makes the pass causal.

    Args:
        attn_metadata: vLLM's metadata objects by layer name, shared between layers.
        tree: the pass's trees.
    """
    for metadata in attn_metadata.values():
        setattr(metadata, ATTRIBUTE, tree)


def trees_for(layer: Any, attn_metadata: Any) -> TreeRows | None:
    """The trees that an attention layer has to follow; None where it is causal.

    The draft's prefill can share the target's metadata, and is causal.
    """
    tree: TreeRows | None = getattr(attn_metadata, ATTRIBUTE, None)
    if tree is None or (getattr(layer, "is_draft_layer", False) and not tree.is_draft):
        return None
    return tree


def replace_backend(name: str, backend: type) -> None:
    """Put a backend of ours in the place of one of vLLM's, for engines made from now on.

    Args:
        name: the member of vLLM's `AttentionBackendEnum`.
        backend: its subclass.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    place, path = AttentionBackendEnum[name], f"{backend.__module__}.{backend.__qualname__}"
    if place.get_path() != path:
        register_backend(place, path)
        # An engine without trees may have been here before.
        selector._cached_get_attn_backend.cache_clear()
