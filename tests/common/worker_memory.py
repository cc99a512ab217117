"""What a server's worker has in use, asked for over the server's own API."""

from __future__ import annotations

import ctypes
import gc
import sys

from tests.common.worker import REPOSITORY

# Of ``vllm serve``, and of its environment: vLLM answers ``/collective_rpc`` in this mode only.
OPTIONS = ("--worker-extension-cls", "tests.common.worker_memory.WorkerMemory")
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(REPOSITORY)}


class _Info(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


class WorkerMemory:
    """The method that `OPTIONS` give to a worker."""

    def memory_in_use(self) -> dict[str, float]:
        """MiB that glibc has handed out, and Python's own small blocks (512 bytes at most).

        Freed room goes back to the system first, so that resident memory shows what is in use.
        """
        libc = ctypes.CDLL("libc.so.6")
        libc.mallinfo2.restype = _Info
        gc.collect()
        libc.malloc_trim(0)
        found = libc.mallinfo2()
        in_use = (found.uordblks + found.hblkhd) / 2**20
        return {"in_use_mib": round(in_use, 1), "python_blocks": sys.getallocatedblocks()}
