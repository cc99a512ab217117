"""What vLLM 0.33 needs on the GPU machine: a general plugin of vLLM, announced by collect.py.

vLLM calls `apply` in each of its processes, before it builds a configuration or a worker.
"""

import os
from pathlib import Path


def apply() -> None:
    """Leave out what the kit does not bring; does nothing without CUDA."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    leave_out_missing_backends()
    if os.environ.get("KIT_NO_C") == "1":
        leave_out_native_code()


def leave_out_missing_backends() -> None:
    """FlashInfer, and flash attention as long as its library is absent: vLLM would prefer them."""
    import vllm
    from vllm.platforms import cuda
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backend

    if hasattr(cuda, "_kit_priorities"):
        return
    missing = {Backend.FLASHINFER}
    if not (Path(vllm.__file__).parent / "vllm_flash_attn/_vllm_fa3_C.abi3.so").is_file():
        missing.add(Backend.FLASH_ATTN)
    cuda._kit_priorities = cuda._get_backend_priorities
    of_encoders = cuda.CudaPlatformBase.get_supported_vit_attn_backends.__func__

    def priorities(*args, **kwargs):
        return [b for b in cuda._kit_priorities(*args, **kwargs) if b not in missing]

    def encoder_backends(cls):
        others = [b for b in of_encoders(cls) if b not in {*missing, Backend.TORCH_SDPA}]
        return [Backend.TORCH_SDPA, *others]

    cuda._get_backend_priorities = priorities
    cuda.CudaPlatformBase.get_supported_vit_attn_backends = classmethod(encoder_backends)


def leave_out_native_code() -> None:
    """No operation of vLLM's own library is used, see README.md."""
    from vllm.utils import torch_utils
    from vllm.v1.worker.gpu import buffer_utils

    buffer_utils.is_uva_available = lambda: False  # buffers on the device, filled by copies
    torch_utils.weak_ref_tensor = lambda tensor: tensor  # graphs keep their outputs alive then
