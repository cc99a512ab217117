"""CUDA graphs emulated on the CPU, together with Triton's interpreter, for Model Runner V2.

``graph`` records what a capture launches and launches it again on replay; ``device`` puts it in the
place of torch's graphs; ``engines`` moves the switches of vLLM that keep graphs from a CPU;
``fast_kernels`` stand for kernels that take seconds a step when interpreted.

Kept of real graphs: Python is not run again, so host values are those of the capture; tensors are
addresses, and one that has been freed since is an error that names the line of its first use;
memory allocated by the capture is the graph's own and holds NaN (or -1) between replays where
nobody outside holds it; what waits for the device ends the capture with the line that did it.

Not kept: the difference between host and device memory (a copy to the host cannot be told from one
on the device, a tensor made on the host is recorded), whether a CUDA operation waits or allocates
inside, streams and events, races between a replay and the host, several processes, torch.compile
and piecewise graphs, what outputs of graphs in one pool do to each other, speed.
"""

from tests.common.cuda_graphs.device import emulated_graphs
from tests.common.cuda_graphs.graph import CaptureError, EmulatedCUDAGraph, StaleGraphError

__all__ = ["CaptureError", "EmulatedCUDAGraph", "StaleGraphError", "emulated_graphs"]
