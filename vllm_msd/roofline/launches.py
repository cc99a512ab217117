"""How often a step starts a kernel, and what a start costs.

The counts below stand until a file with better ones is given (`read`): ``{"launches": {KIND:
{FIELD: NUMBER}}}`` with the kinds of `LAUNCHES` and the fields of `LaunchCounts`; what the file
leaves out stays as it is here, other entries beside ``launches`` are the writer's.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vllm_msd.errors import ConfigError


@dataclass(frozen=True)
class LaunchCounts:
    """Kernels of one step besides the target's.

    outside: issued one by one by Python in every step: inputs, sampling, settling.
    prefill: of the draft's prefill, always inside a graph.
    once: of drafting, whatever the depth. level: of each level after the prefill.
    in_graph: whether those two are replayed as a graph or issued one by one.
    """

    outside: int
    prefill: int = 0
    once: int = 0
    level: int = 0
    in_graph: bool = True


# Trees in three stages: "eager" as Python issues the levels, "graph" the same replayed as one
# graph, "fused" with kernels for top-k, beam step and rerank in it.
STAGES = ("eager", "graph", "fused")

# A step with a tree of depth 5 and top-k 4 issues about 400 launches, 60 a level; recorded as a
# graph, its drafting is 300 of them, 59 a level. With fused kernels about 80 should be left, of
# which the layer is 12 a level. vLLM's own chain is one graph of 30 a level. Counted at batch 1 by
# recording torch's and Triton's calls on a CPU; "fused", and what is outside without speculation
# (60) or with a chain (80), are estimates.
LAUNCHES = {
    "none": LaunchCounts(outside=60),
    "chain": LaunchCounts(outside=80, prefill=30, once=0, level=30),
    "tree eager": LaunchCounts(outside=93, prefill=30, once=67, level=60, in_graph=False),
    "tree graph": LaunchCounts(outside=93, prefill=30, once=64, level=59),
    "tree fused": LaunchCounts(outside=93, prefill=30, once=8, level=18),
}

# The target under CUDA graphs: a layer's norms, products, rotation, cache update, attention and
# activation, and what is around the layers.
TARGET_KERNELS_A_LAYER = 12
TARGET_KERNELS_AROUND = 5


@dataclass(frozen=True)
class LaunchCosts:
    """Seconds a launch; both defaults are assumptions, not measured here.

    eager: host time to issue an operation from Python through torch's dispatcher: 5 to 10 us are
        usual, 6 to 8 for the small tensors of drafting.
    graph: what a kernel that need not wait for the host, as in a graph, adds to its own work
        (start, drain, the gap to the next): 1.0 to 1.5 us are usual on Hopper.
    """

    eager: float = 7e-6
    graph: float = 1.2e-6


COSTS = LaunchCosts()


def read(path: Path) -> dict[str, LaunchCounts]:
    """`LAUNCHES` with the counts of a JSON file in their place.

    Raises:
        ConfigError: the file has not the form above; the message names the entry.
    """
    try:
        found = json.loads(path.read_text())["launches"]
        entries = {kind: dict(counts) for kind, counts in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"launches: {path} cannot be read ({type(error).__name__}: {error}), expected a JSON "
            'file {"launches": {"tree graph": {"level": 59}}}.'
        ) from error
    known = {field.name for field in fields(LaunchCounts)}
    result = dict(LAUNCHES)
    for kind, counts in entries.items():
        if kind not in LAUNCHES:
            raise ConfigError(f"launches: got {kind!r} in {path}, expected some of {[*LAUNCHES]}.")
        for name, value in counts.items():
            right = isinstance(value, bool) if name == "in_graph" else type(value) is int
            if name not in known or not right or value < 0:
                raise ConfigError(
                    f"launches: got {name!r}: {value!r} for {kind!r} in {path}, expected some of "
                    f"{sorted(known)}, whole numbers (in_graph: true or false)."
                )
        result[kind] = replace(LAUNCHES[kind], **counts)
    return result
