"""A CUDA device for tensors, as far as a CPU can pretend one.

    with pretended_cuda() as gpu:
        model.to("cuda")(torch.zeros(3, device="cuda"))

All tensors lie in the CPU's memory. Which of them would be on the device is remembered by their
storage: they say so when asked, and what a GPU refuses is refused. That is an operation on tensors
of both places (a single number may come from the CPU), and reading a tensor of the device without
fetching it. What is computed is what the CPU computes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
# They copy from one place to the other.
_COPIES = {aten.copy_, aten._to_copy, aten.set_, aten.set_data}
# Indices of tensors on the device may come from the CPU.
_INDEXING = {aten.index, aten.index_put_, aten._index_put_impl_, aten.index_put}
_WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal}


class Gpu:
    """What is on the device, and what was asked of it.

    launches: operations on the device by name. waits: those for whose result the CPU waits.
    """

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}  # kept, so that no other one takes a name
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return tensor.untyped_storage()._cdata in self._storages

    def place(self, tensor: Tensor, on_device: bool = True) -> None:
        """Say where a tensor is."""
        storage = tensor.untyped_storage()
        if on_device:
            self._storages[storage._cdata] = storage
        else:
            self._storages.pop(storage._cdata, None)


class _Asked(TorchFunctionMode):
    """Turns the device that Python code asks for into the CPU."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Call `func`, and note where its result would be."""
        gpu, kwargs, name = self.gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        of = getattr(func, "__self__", None)
        if of is Tensor.device:
            return CUDA if gpu.holds(args[0]) else func(*args, **kwargs)
        if of is Tensor.is_cuda:
            return gpu.holds(args[0])
        if of is Tensor.is_cpu:
            return not gpu.holds(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        if name in ("numpy", "__array__") and gpu.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        wanted = self._wanted(name, args, kwargs)
        if wanted is None:
            return func(*args, **kwargs)
        result = func(*tree_map(_host, args), **tree_map(_host, kwargs))
        if not isinstance(result, Tensor) or result.device.type == "meta":
            return result
        moved = isinstance(args[0], Tensor) and name in ("to", "cpu", "cuda")
        if moved and gpu.holds(result) != (wanted.type == "cuda"):
            if wanted.type == "cpu":
                gpu.waits[name] += 1
            result = result.clone() if result is args[0] else result
        gpu.place(result, wanted.type == "cuda")
        return result

    def _wanted(self, name: str, args: tuple, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call names, if it names one."""
        if name in ("cuda", "cpu") and args and isinstance(args[0], Tensor):
            return CUDA if name == "cuda" else CPU
        if name == "new_tensor":
            return CUDA if self.gpu.holds(args[0]) else CPU
        named = [kwargs.get("device")]
        if name == "to" and len(args) > 1:
            other = args[1]
            if isinstance(other, Tensor):
                return CUDA if self.gpu.holds(other) else CPU
            named.append(other)
        for device in named:
            if isinstance(device, str):
                device = torch.device(device)
            if isinstance(device, torch.device) and device.type in ("cuda", "cpu"):
                return device
        return None


def _host(value: Any) -> Any:
    is_device = isinstance(value, torch.device) and value.type == "cuda"
    is_name = isinstance(value, str) and value.partition(":")[0] == "cuda"
    return CPU if is_device or is_name else value


class _Computed(TorchDispatchMode):
    """Refuses operations on tensors of both places; what comes of the device's is the device's."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Compute on the CPU."""
        kwargs, packet, gpu = kwargs or {}, func.overloadpacket, self.gpu
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = [t for t in given if t.device.type != "meta"]
        used = given
        if packet in _INDEXING and given and gpu.holds(given[0]):
            used = [given[0]]
        on_device = [t for t in used if gpu.holds(t)]
        if on_device and packet not in _COPIES:
            strangers = [t for t in used if not gpu.holds(t) and t.dim() > 0]
            if strangers:
                raise RuntimeError(
                    f"{func}: Expected all tensors to be on the same device, but found cuda:0 "
                    f"({[tuple(t.shape) for t in on_device]}) and cpu "
                    f"({[tuple(t.shape) for t in strangers]})"
                )
        if any(gpu.holds(t) for t in given):
            gpu.launches[packet.__name__] += 1
            is_mask = packet in _INDEXING and any(t.dtype == torch.bool for t in given[1:])
            if packet in _WAITING or is_mask:
                gpu.waits[packet.__name__] += 1
        before = {t.untyped_storage()._cdata for t in given}
        result = func(*args, **kwargs)
        if on_device:  # a copy goes where its source is, until `_Asked` says otherwise
            for out in tree_leaves(result):
                if isinstance(out, Tensor) and out.untyped_storage()._cdata not in before:
                    gpu.place(out)
        return result


class _Generator(torch.Generator):
    """A generator that says that it is the device's."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        """Make one."""
        made = super().__new__(cls, CPU)
        made.where = torch.device(device) if isinstance(device, str) else device
        return made

    @property
    def device(self) -> torch.device:
        """Where its numbers would come from."""
        return self.where


@contextmanager
def pretended_cuda() -> Iterator[Gpu]:
    """Within, PyTorch has a device ``cuda``, and accelerate computes on it."""
    from accelerate.state import AcceleratorState, PartialState

    gpu = Gpu()
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).device = CUDA
    try:
        with (
            mock.patch.object(torch, "Generator", _Generator),
            mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
            _Asked(gpu),
            _Computed(gpu),
        ):
            yield gpu
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
