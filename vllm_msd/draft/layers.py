"""The draft's decoder layer: grouped-query attention with rotary positions, and a gated MLP.

Llama-type and Qwen2-type layers differ in the q/k/v bias and in the input norm of layer 0 only.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_msd.draft.cache import DraftCache
from vllm_msd.draft.config import MSDDraftConfig


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, the mean square taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size]`` to the same shape and dtype."""
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[B, 1, S, head_dim]`` float32 for positions ``[B, S]``."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[..., None].float() * (1.0 / theta**exponents)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads ``[B, heads, S, head_dim]``; component i is paired with i + head_dim / 2."""
    x32 = x.float()
    first, second = x32.chunk(2, -1)
    return (x32 * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention over the cached columns and the new ones."""

    def __init__(self, config: MSDDraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        layer: int,
        cache: DraftCache | None,
    ) -> Tensor:
        """``x [B, S, H]``, ``visible [B, 1, S, C]`` bool or None for plain causal attention."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        # Drafting feeds the draft its own output, which amplifies the rounding of fused kernels;
        # with a cache attention is therefore computed as it is written.
        with nullcontext() if cache is None else sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=visible is None,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: MSDDraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, H]`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer; layer 0 of a Llama-type draft feeds attention without a norm."""

    def __init__(self, config: MSDDraftConfig, index: int) -> None:
        super().__init__()
        self.index = index
        has_input_norm = index > 0 or config.input_norm
        norm_size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(norm_size, eps) if has_input_norm else nn.Identity()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(norm_size, eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Tensor | None,
        cache: DraftCache | None,
    ) -> Tensor:
        """``[B, S, H]`` to the same; see `Attention.forward` for the other arguments."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, visible, self.index, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
