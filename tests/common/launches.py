"""What a launch may do beside its kernels under CUDA graphs: nothing."""

from torch.utils._python_dispatch import TorchDispatchMode


class NoOperation(TorchDispatchMode):
    """Refuses PyTorch's operations: allocations, copies, reads of a tensor's contents."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} beside the kernels: a CUDA graph would hold it")
