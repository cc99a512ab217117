"""Speculative configs that nobody means: drawn at random, and what may come of one."""

from __future__ import annotations

import string
from typing import Any

from hypothesis import strategies as st

from vllm_msd.errors import MSDError
from vllm_msd.vllm_plugin.configuration.guards import KEYS, TREE_KEYS

_text = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "msd",
        "eagle",
        "~nobody",
        "a/b",
        "a--b/..",
        "../draft",
        "\0",
        "x" * 5000,
        "None",
        "5",
    ]
)
_numbers = (
    st.integers() | st.integers(-2, 70) | st.floats() | st.sampled_from([2**31, 2**63, 1e400])
)
junk = st.recursive(
    st.none() | st.booleans() | _numbers | _text | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=5,
)
# What could be meant, for each setting; drawn mostly, so that more than one thing is checked.
_MEANT: dict[str, st.SearchStrategy] = {
    "num_speculative_tokens": st.integers(1, 24) | st.just("auto"),
    "tree_depth": st.integers(1, 6),
    "tree_top_k": st.integers(1, 6),
    "max_model_len": st.integers(1, 4096),
    "enforce_eager": st.booleans(),
    "draft_sample_method": st.sampled_from(["greedy", "probabilistic"]),
    "rejection_sample_method": st.sampled_from(["standard", "synthetic", "block", "fly"]),
    "synthetic_acceptance_rates": st.lists(st.floats(0, 1), max_size=6),
    "synthetic_acceptance_length": st.floats(0, 8),
    "draft_load_config": st.fixed_dictionaries({"load_format": st.sampled_from(["auto", "gguf"])}),
    "num_speculative_tokens_per_batch_size": st.lists(
        st.tuples(*[st.integers(0, 300)] * 3).map(list), max_size=3
    ),
    "attention_backend": st.sampled_from(["TRITON_ATTN", "CPU_ATTN"]),
    "kv_cache_dtype": st.sampled_from(["auto", "fp8"]),
}
_settings = st.sampled_from(sorted({*KEYS, *TREE_KEYS} - {"method", "model"})).flatmap(
    lambda key: st.tuples(st.just(key), st.one_of(junk, *[_MEANT.get(key, junk)] * 2))
)
_unknown = st.tuples(st.text(string.ascii_lowercase + "_-", max_size=24), junk)


def configs(draft: str) -> st.SearchStrategy[dict[str, Any]]:
    """Requests for MSD with this draft (mostly), and anything else in them."""
    settings = st.lists(_settings | _settings | _unknown, max_size=4).map(dict)
    model = st.just(draft) | st.just(draft) | st.just(draft) | junk
    return st.builds(lambda rest, name: {**rest, "method": "msd", "model": name}, settings, model)


def outcome(create: Any, arguments: Any, config: Any, target: Any, parallel: Any) -> str:
    """``served`` or ``refused``; anything else that vLLM or we raise comes through.

    Args:
        create: `EngineArgs.create_speculative_config`, patched.
        arguments: the engine's arguments.
        config: the speculative config to try.
        target, parallel: vLLM's configs of the target.
    """
    arguments.speculative_config = config
    try:
        spec = create(arguments, target, parallel)
    except MSDError as error:
        assert len(str(error)) > 20, f"says too little: {error}"
        return "refused"
    assert spec.method == "eagle" and hasattr(spec.draft_model_config.hf_config, "msd_draft")
    return "served"
