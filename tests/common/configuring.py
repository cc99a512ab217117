"""vLLM's speculative configuration for a tiny pair, without starting an engine."""

from typing import Any

from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from tests.common import tiny


def configure(
    target: str, speculative_config: dict[str, Any] | None, **engine: Any
) -> SpeculativeConfig | None:
    """What vLLM makes of these arguments."""
    args = EngineArgs(
        model=target, speculative_config=speculative_config, max_model_len=512, **engine
    )
    return args.create_engine_config().speculative_config


def msd(pair: tiny.TinyPair, **keys: Any) -> dict[str, Any]:
    """A request for a pair's draft."""
    return {"method": "msd", "model": pair.draft, **keys}


def tree(nodes: int, depth: int, top_k: int) -> dict[str, int]:
    """The keys that ask for a tree."""
    return {"num_speculative_tokens": nodes, "tree_depth": depth, "tree_top_k": top_k}
