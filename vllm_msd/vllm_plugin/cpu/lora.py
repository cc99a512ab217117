"""Rows without an adapter, on a CPU: vLLM 0.32 gives them the adapter in its last place.

It marks such a row with -1 and takes ``weights[-1]`` for it. So a request to the base model got
other text when every place was taken by an adapter. vLLM 0.33 masks these rows itself.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from typing_extensions import override
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from vllm_msd.vllm_plugin.patches.overrides import check_overrides


class MaskedPunicaWrapper(PunicaWrapperCPU):
    """Adapters see zeros in rows that have none, so what they add there is zero."""

    @override
    def add_lora_linear(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_linear(y, _masked(x, self.token_lora_indices), *args, **kwargs)

    @override
    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_embedding(y, _masked(x, self.token_lora_indices), *args, **kwargs)

    @override
    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_logits(y, _masked(x, self.sampler_indices), *args, **kwargs)


def _masked(x: Tensor, adapters: Tensor) -> Tensor:
    """``[T, D]``: the rows of x, zeros where the row's adapter (int64 ``[T]``) is -1."""
    rows = x.view(-1, x.shape[-1])
    return rows.masked_fill((adapters < 0).unsqueeze(-1), 0)


def mask_rows_without_adapter(runner: Any) -> None:
    """Let a new runner's adapters, once they are loaded, leave other requests' rows alone."""
    check_overrides(MaskedPunicaWrapper)
    original = runner.load_lora_model

    @functools.wraps(original)
    def load_lora_model(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        # The layers hold these objects already, so they become ours where they are.
        for wrapper in runner.lora_manager._adapter_manager.punica_wrapper_mapping.values():
            wrapper.__class__ = MaskedPunicaWrapper
        return model

    runner.load_lora_model = load_lora_model
