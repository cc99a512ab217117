"""Attention of token-tree queries over a paged KV cache: eager twin, Triton kernel, public call."""
