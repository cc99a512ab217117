"""What a launch may do beside its kernels under CUDA graphs: nothing."""

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = ("aten.view.", "aten._unsafe_view.", "aten.slice.", "aten.select.")


class NoOperation(TorchDispatchMode):
    """Refuses PyTorch's operations: allocations, copies, reads of a tensor's contents.

    With ``views`` those are allowed that only look at the same memory in another shape.
    """

    def __init__(self, views: bool = False) -> None:
        super().__init__()
        self.views = views

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.views and str(func).startswith(VIEWS):
            return func(*args, **(kwargs or {}))
        raise AssertionError(f"{func} beside the kernels: a CUDA graph would hold it")
