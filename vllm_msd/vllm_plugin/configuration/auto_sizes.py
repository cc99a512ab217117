"""Sizes left to the plugin: which shapes an engine may draft, where it can choose at run time.

Under Model Runner V1 on a CPU each step drafts as much as pays (`vllm_msd.budget`). Elsewhere, and
beside what goes with fixed chains only, the draft's preferred sizes are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from vllm_msd.budget import AUTO, AcceptancePrior
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
    if not runs_v1_on_cpu():
        raise ConfigError("only Model Runner V1 on a CPU chooses sizes at run time.")
    if parallel.tensor_parallel_size > 1:
        raise ConfigError(f"got tensor_parallel_size={parallel.tensor_parallel_size}, expected 1.")
    shapes, reasons = [], []
    tree = TreeConfig.from_settings(
        draft.num_speculative_tokens, draft.tree_depth, draft.tree_top_k
    )
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


def runs_v1_on_cpu() -> bool:
    """Whether engines of this process run Model Runner V1 on a CPU, asked before their config is
    complete."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    return current_platform.is_cpu() and not (HAS_TRITON if chosen is None else chosen)


def settings_of(shapes: list[TreeConfig]) -> dict[str, int]:
    """The size settings of an engine that has room for all of these."""
    largest = max(shapes, key=lambda shape: shape.num_nodes)
    return dict(zip(_SIZES, astuple(largest), strict=True))
