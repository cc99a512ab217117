"""The draft sharded over processes (`--fsdp`) by torch's own `fully_shard` (FSDP2).

Each process keeps its part of the weights, gradients and AdamW's moments. The whole objective is
one unit: the draft's layer is used again at every drafting step, and would have to be gathered for
each of them on its own. Losses stay what they are. (accelerate shards on accelerators alone.)
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from vllm_msd.errors import ConfigError

_STATE = "sharded.pt"
_WHOLE = StateDictOptions(full_state_dict=True)
# Gathered on the first process alone, tensor by tensor: all at once might not fit a device.
_WHOLE_IN_MEMORY = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_processes(processes: int) -> None:
    """Raise `ConfigError` where there is nobody to share with."""
    if processes < 2:
        raise ConfigError(
            "fsdp: got one process, expected several. Start them with `torchrun --nproc-per-node 8 "
            "-m vllm_msd.cli.main train ...`, or leave --fsdp out."
        )


def shard(objective: nn.Module, device: torch.device, processes: int) -> None:
    """Shard an objective in place, over all processes; before its optimizer is made."""
    fully_shard(objective, mesh=init_device_mesh(device.type, (processes,)))


def meet(objective: nn.Module, together: bool) -> None:
    """Whether the gradients of the next backward pass are summed over the processes."""
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(together)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(objective: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, write: bool) -> None:
    """Gather weights and moments, and write them where asked to; every process must call this."""
    weights, moments = get_state_dict(objective, optimizer, options=_WHOLE_IN_MEMORY)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": weights, "moments": moments}, folder / _STATE)


def load(objective: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take up what `save` wrote, on any number of processes."""
    state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    set_state_dict(
        objective, optimizer, model_state_dict=state["weights"],
        optim_state_dict=state["moments"], options=_WHOLE,
    )  # fmt: skip
