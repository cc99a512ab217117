"""Model Runner V2: drafts chains as vLLM's EAGLE speculator does, with one mend for images."""

from __future__ import annotations

from typing_extensions import override
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator


class ChainSpeculator(EagleSpeculator):
    """EAGLE's speculator, whose full CUDA graphs take decoding batches only.

    With ``cudagraph_mode=FULL`` vLLM replays the draft's prefill for prompts too. Such a graph
    knows no images, and their rows would be drafted as text: output stays right, acceptance falls.
    """

    @override
    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """As the base class; prompts are drafted without full graphs."""
        if cudagraph_mode == CUDAGraphMode.FULL:
            cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        super().init_cudagraph_manager(cudagraph_mode)
