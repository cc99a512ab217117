"""Data-parallel training over CPU processes of one thread each.

Two single-thread processes that meet once a step lose far less to a busy machine than one process
with two threads, whose every operator waits for the slower thread.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank: int, processes: int, meeting: str, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # Linux shares processor time by session first: workers of one session would share one part.
    os.setsid()
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
    )
    work(*args)
    dist.destroy_process_group()


def launch(work: Callable, args: tuple, processes: int, folder: Path) -> None:
    """Run `work(*args)` in this many processes; 1 runs it here."""
    if processes == 1:
        work(*args)
        return
    folder.mkdir(parents=True, exist_ok=True)
    meeting = folder.absolute() / f"meeting.{os.getpid()}"
    # Daemons end with this process, also on Ctrl-C, which other sessions do not receive, and on a
    # polite kill, which would otherwise end it without a farewell.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    mp.spawn(_entry, (processes, str(meeting), work, args), nprocs=processes, daemon=True)
    meeting.unlink(missing_ok=True)


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(value: float) -> float:
    """The first process's value: a clock that all follow."""
    if size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return tensor.item()


def average_gradients(parameters: list[Any]) -> None:
    """Replace gradients by their mean over the processes; a missing one counts as zero."""
    if size() == 1:
        return
    flat = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters]
    )
    dist.all_reduce(flat)
    flat /= size()
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
