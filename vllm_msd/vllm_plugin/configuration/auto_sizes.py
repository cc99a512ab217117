"""Sizes left to the plugin: which shapes an engine may draft, where it can choose at run time.

Under Model Runner V1 on a CPU each step drafts as much as pays (`vllm_msd.budget`), a chain or a
tree. Under Model Runner V2 the draft's preferred shape is drafted, and as many of its nodes as pay
at a step's number of requests. Beside what goes with fixed sizes only, those preferred are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from vllm_msd.budget import AUTO, AcceptancePrior, candidate_sizes
from vllm_msd.errors import ConfigError
from vllm_msd.tree.config import TreeConfig
from vllm_msd.vllm_plugin.configuration import guards

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_msd.draft import MSDDraftConfig

_SIZES = ("num_speculative_tokens", *guards.TREE_KEYS)
# The largest that is ever drafted: a chain, and a tree where the draft prefers none.
CHAIN = TreeConfig(8, 8, 1)
TREE = TreeConfig(16, 6, 3)
MOST_SIZES = 6  # that a schedule chooses from: each has CUDA graphs of its own


def is_auto(request: Mapping[str, Any]) -> bool:
    """Whether a speculative config leaves the sizes to the plugin.

    Raises:
        ConfigError: it does, and gives some nevertheless.
    """
    given = {key: request[key] for key in _SIZES if request.get(key) not in (None, AUTO)}
    if given and request.get("num_speculative_tokens") == AUTO:
        raise ConfigError(
            f"num_speculative_tokens: got {AUTO!r} beside {given}. Leave the other sizes out, or "
            "give a number of tokens."
        )
    return not given


def auto_shapes(
    engine_args: EngineArgs,
    request: Mapping[str, Any],
    draft: MSDDraftConfig,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> list[TreeConfig]:
    """The shapes that the engine chooses from at start, the largest first; at least one.

    Args:
        engine_args: the whole engine's arguments.
        request: the merged speculative config, which `is_auto`.
        draft: config of the draft.
        target: config of the target.
        parallel: how the target is spread.

    Raises:
        ConfigError: sizes have to be fixed here; the message says why.
    """
    AcceptancePrior.from_config(draft.msd_acceptance)
    tree = TreeConfig.from_settings(
        draft.num_speculative_tokens, draft.tree_depth, draft.tree_top_k
    )
    if not runs_v1_on_cpu():
        _check_schedulable(engine_args, request, parallel)
        return [tree]
    if parallel.tensor_parallel_size > 1:
        raise ConfigError(f"got tensor_parallel_size={parallel.tensor_parallel_size}, expected 1.")
    shapes, reasons = [], []
    longest = target.max_model_len - 1
    for shape in (TREE if tree.is_chain else tree, CHAIN):
        try:
            if shape.num_nodes > longest:
                raise ConfigError(f"max_model_len leaves {longest} rows beside a token.")
            guards.check_tree(shape, engine_args, request, target, parallel)
            shapes.append(shape)
        except ConfigError as error:
            reasons.append(str(error))
    if not shapes:
        raise ConfigError(reasons[-1])
    return shapes


def _check_schedulable(
    engine_args: EngineArgs, request: Mapping[str, Any], parallel: ParallelConfig
) -> None:
    """Refuse where Model Runner V2's scheduler cannot choose sizes, or somebody else does."""
    if not runs_v2():
        raise ConfigError("Model Runner V1 chooses sizes at run time on a CPU only.")
    for name in ("num_speculative_tokens_per_batch_size", "enable_adaptive_verification"):
        if request.get(name):
            raise ConfigError(f"{name} says how many tokens a step verifies.")
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            f"got data_parallel_size={parallel.data_parallel_size}, expected 1: replicas would "
            "choose differently."
        )
    if parallel.distributed_executor_backend == "external_launcher":
        raise ConfigError(
            "distributed_executor_backend='external_launcher' runs a scheduler on each rank, and "
            "they would choose differently."
        )
    if engine_args.max_num_seqs == 1:
        raise ConfigError("got max_num_seqs=1, expected at least 2 for a schedule of sizes.")


def sizes_to_schedule(engine_args: EngineArgs, shapes: list[TreeConfig]) -> list[int]:
    """Numbers of nodes that Model Runner V2's scheduler chooses from; empty where it does not.

    A schedule names one for each number of requests, so there are no more than these.

    Args:
        engine_args: the whole engine's arguments.
        shapes: of `auto_shapes`.
    """
    if not shapes or runs_v1_on_cpu():
        return []
    (shape,) = shapes
    return candidate_sizes(shape.num_nodes, min(MOST_SIZES, engine_args.max_num_seqs or MOST_SIZES))


def schedule_of(sizes: list[int]) -> list[list[int]]:
    """A schedule that names these sizes, so that vLLM captures CUDA graphs for each of them.

    The scheduler is given another lookup before it uses this one, see `scheduled_sizes`.
    """
    return [[batch, batch, nodes] for batch, nodes in enumerate(reversed(sizes), 1)]


def runs_v2() -> bool:
    """Whether engines of this process run Model Runner V2, asked before their config is complete.

    vLLM may find a reason against it later on.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    return HAS_TRITON if chosen is None else chosen


def runs_v1_on_cpu() -> bool:
    """Whether engines of this process run Model Runner V1 on a CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and not runs_v2()


def settings_of(shapes: list[TreeConfig]) -> dict[str, int]:
    """The size settings of an engine that has room for all of these."""
    largest = max(shapes, key=lambda shape: shape.num_nodes)
    return dict(zip(_SIZES, astuple(largest), strict=True))
