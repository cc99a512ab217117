"""What MSD cannot do yet is refused before the engine starts, with the reason and a remedy."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_msd.budget import AUTO
from vllm_msd.errors import ConfigError
from vllm_msd.tree.config import TreeConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_msd.draft import MSDDraftConfig

# vLLM's rejection sampler has room for this many draft tokens of one request.
MAX_SPECULATIVE_TOKENS = 128

# Target architecture -> model types its language model may have.
SUPPORTED_TARGETS = {
    "LlavaForConditionalGeneration": ("llama",),
    "LlavaNextForConditionalGeneration": ("llama", "mistral"),
    "LlavaOnevisionForConditionalGeneration": ("qwen2",),
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "qwen2_vl_text", "qwen2"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "qwen2_5_vl_text", "qwen2"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl_text",),
}

# Keys of vLLM's speculative config that mean something for an MSD draft.
KEYS = frozenset(
    {
        "method", "model", "num_speculative_tokens", "revision", "code_revision", "enforce_eager",
        "draft_tensor_parallel_size", "max_model_len", "attention_backend", "kv_cache_dtype",
        "draft_load_config", "draft_sample_method", "rejection_sample_method",
        "synthetic_acceptance_rates", "synthetic_acceptance_length",
        "disable_padded_drafter_batch", "disable_eagle_block_drop",
        "disable_lookahead_block_hashes", "use_local_argmax_reduction",
        "num_speculative_tokens_per_batch_size", "enable_adaptive_verification",
        "draft_lm_head_quantization",
    }
)  # fmt: skip
# Ours: how deep and wide the tree is that num_speculative_tokens nodes are chosen from.
TREE_KEYS = ("tree_depth", "tree_top_k")

# Settings of the engine that only chains go with, and why.
_NOT_WITH_TREES = {
    "kv_transfer_config": "rows may be sent away before the tree is settled",
    "logits_processors": "a processor of your own may read the rows before its own as its past",
    "watermark_config": "a watermark depends on the tokens of the rows before",
    "enable_dbo": "a step's trees are those of one batch",
    "enable_batch_sharded_sampling": "a tree is sampled and walked on one rank",
}

# Loaders that read whole files of a target's own kind; the draft's checkpoint has none of them.
_TARGET_ONLY_LOADERS = frozenset(
    {"bitsandbytes", "gguf", "mistral", "runai_streamer_sharded", "sharded_state", "tensorizer"}
)


def check_keys(request: Mapping[str, Any]) -> None:
    """Refuse keys that vLLM does not know or that mean nothing for MSD, each with a suggestion."""
    from vllm.config import SpeculativeConfig

    vllm_keys = {f.name for f in dataclasses.fields(SpeculativeConfig)}
    for key in request:
        if key in TREE_KEYS or (key in KEYS and key in vllm_keys):
            continue
        if key == "tensor_parallel_size":
            raise ConfigError(
                "speculative_config['tensor_parallel_size'] is not a setting; the draft runs with "
                "the target's tensor parallel size. Leave it out."
            )
        if key in vllm_keys or key in KEYS:
            raise ConfigError(
                f"speculative_config[{key!r}] has no meaning for the method 'msd' under this vLLM. "
                "Leave it out."
            )
        known = sorted({*(KEYS & vllm_keys), *TREE_KEYS})
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
        raise ConfigError(f"speculative_config[{key!r}] is not a known setting. {hint}")


def size_settings(request: Mapping[str, Any], draft: MSDDraftConfig) -> dict[str, Any]:
    """`num_speculative_tokens`, `tree_depth` and `tree_top_k`: the request's, else the draft's.

    "auto" counts as not given; `auto_sizes` says where an engine chooses by itself.

    A request for a chain (`tree_top_k` 1) needs no depth, whatever the draft's is.
    """
    names = ("num_speculative_tokens", *TREE_KEYS)
    settings = {
        name: getattr(draft, name) if request.get(name, AUTO) == AUTO else request[name]
        for name in names
    }
    if request.get("tree_top_k") == 1 and "tree_depth" not in request:
        settings["tree_depth"] = None
    return settings


def check_engine(
    engine_args: EngineArgs,
    request: Mapping[str, Any],
    draft: MSDDraftConfig,
    draft_name: str,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> TreeConfig:
    """Refuse an engine that cannot serve this draft.

    Args:
        engine_args: the whole engine's arguments.
        request: the merged speculative config, with `size_settings` filled in.
        draft: config of the draft, already checked in itself.
        draft_name: folder or hub name of the draft, for messages.
        target: config of the target.
        parallel: how the target is spread.

    Returns:
        size of the trees to draft; of a chain where no tree was asked for.

    Raises:
        ConfigError: with reason and remedy.
        CheckpointError: the draft does not fit the target.
    """
    from vllm_msd.checkpoint import check_draft_fits_target

    _check_target_family(target)
    check_draft_fits_target(draft, target.hf_config)
    _check_num_speculative_tokens(request["num_speculative_tokens"], target)
    _check_parallel(request, parallel)
    _check_settings(request)
    _check_schedule(request)
    load_format = str(engine_args.load_format)
    if load_format in _TARGET_ONLY_LOADERS and request.get("draft_load_config") is None:
        raise ConfigError(
            f"load_format={load_format!r} cannot read the draft {draft_name}. Set "
            "speculative_config['draft_load_config'] to {'load_format': 'auto'}."
        )
    if engine_args.enable_prompt_embeds:
        raise ConfigError(
            "enable_prompt_embeds does not work with MSD: the draft reads the prompt's token ids. "
            "Turn it off."
        )
    tree = TreeConfig.from_settings(
        request["num_speculative_tokens"], request["tree_depth"], request["tree_top_k"]
    )
    if draft.draft_vocab_size is not None and draft.draft_vocab_size < tree.top_k:
        raise ConfigError(
            f"tree_top_k: got {tree.top_k}, expected at most {draft.draft_vocab_size}, the tokens "
            "that the draft proposes at all (its draft_vocab_size)."
        )
    if draft.draft_vocab_size is not None and request.get("draft_lm_head_quantization"):
        raise ConfigError(
            "draft_lm_head_quantization does not work with a draft vocabulary: vLLM quantizes a "
            "copy of the target's whole head, and this draft takes "
            f"{draft.draft_vocab_size} rows of it. Leave it out, or serve a draft without one."
        )
    if not tree.is_chain:
        check_tree(tree, engine_args, request, target, parallel)
    return tree


def check_tree(
    tree: TreeConfig,
    engine_args: EngineArgs,
    request: Mapping[str, Any],
    target: ModelConfig,
    parallel: ParallelConfig,
) -> None:
    """Refuse what only chains of a fixed size can do.

    Raises:
        ConfigError: with reason and remedy.
    """
    chain = "Change it, or draft a chain: set tree_top_k to 1."
    for name, only in (("draft_sample_method", "greedy"), ("rejection_sample_method", "standard")):
        value = request.get(name)
        if value not in (None, only):
            raise ConfigError(
                f"{name}={value!r} does not work with a draft tree, whose nodes are the draft's "
                f"most likely tokens and are accepted exactly. Only {only!r} does. {chain}"
            )
    if request.get("enable_adaptive_verification"):
        raise ConfigError(
            "enable_adaptive_verification does not work with a draft tree: vLLM estimates how "
            "likely each token of a chain is accepted, and cuts chains by that on the device. "
            "Leave it out, or draft a chain: set tree_top_k to 1."
        )
    if target.get_sliding_window() is not None:
        raise ConfigError(
            "this target's attention has a sliding window, which counts rows; a tree's rows are "
            f"not its positions. {chain}"
        )
    for name, reason in _NOT_WITH_TREES.items():
        if getattr(engine_args, name):
            raise ConfigError(f"{name} does not work with a draft tree: {reason}. {chain}")
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={parallel.data_parallel_size} does not work with a draft tree. "
            "Start one server for each replica instead, or draft a chain: set tree_top_k to 1."
        )
    # What vLLM takes by default is filled in later, and is always enough.
    limit, rows = engine_args.max_num_batched_tokens, max(tree.num_nodes, tree.draft_rows) + 1
    if limit is not None and limit < rows:
        raise ConfigError(
            f"max_num_batched_tokens={limit}: expected at least {rows} with this draft tree "
            f"(num_speculative_tokens {tree.num_nodes}, tree_depth {tree.depth}, tree_top_k "
            f"{tree.top_k}: its nodes, or the rows that draft them, and the token before)."
        )


def _check_target_family(target: ModelConfig) -> None:
    supported = ", ".join(SUPPORTED_TARGETS)
    if target.runner_type != "generate":
        raise ConfigError(
            f"MSD speeds up text generation, but the target runs as {target.runner_type!r}. Remove "
            "the speculative config."
        )
    if target.architecture not in SUPPORTED_TARGETS:
        raise ConfigError(
            f"MSD does not support the target architecture {target.architecture}. "
            f"Supported: {supported}."
        )
    text_type = target.hf_text_config.model_type
    expected = SUPPORTED_TARGETS[target.architecture]
    if text_type not in expected:
        raise ConfigError(
            f"MSD supports {target.architecture} with a language model of type {expected[0]!r}, "
            f"got {text_type!r}."
        )


def _check_num_speculative_tokens(value: Any, target: ModelConfig) -> None:
    limit = min(MAX_SPECULATIVE_TOKENS, target.max_model_len - 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ConfigError(
            f"num_speculative_tokens: got {value!r}, expected a whole number from 1 to {limit}."
        )


def _check_schedule(request: Mapping[str, Any]) -> None:
    """Refuse a schedule that vLLM would stumble over in the engine's process, or silently cut."""
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    name = "num_speculative_tokens_per_batch_size"
    schedule, most = request.get(name), request["num_speculative_tokens"]
    if schedule is None:
        return
    expected = (
        "expected a list of [first batch size, last batch size, drafted tokens], such as "
        f"[[1, 4, {most}], [5, 16, {most // 2}], [17, 1024, 0]]. Batch sizes start at 1 and do not "
        "overlap."
    )
    try:
        entries = validate_and_normalize_dynamic_sd_schedule(schedule)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: got {schedule!r}, {expected} {error}") from error
    largest = max(tokens for *_, tokens in entries)
    if largest > most:
        raise ConfigError(
            f"{name}: got {largest} drafted tokens, expected at most num_speculative_tokens "
            f"({most}). Raise it, or lower the entry."
        )


def _check_parallel(request: Mapping[str, Any], parallel: ParallelConfig) -> None:
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} does not work with MSD: the "
            "draft shares the target's embedding table, which lies on the first pipeline rank, and "
            "its head, which lies on the last. Use tensor parallelism instead."
        )
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise ConfigError(
                f"{name}={getattr(parallel, name)} does not work with MSD: the draft's KV cache is "
                "not split over context ranks. Set it to 1."
            )
    draft_size, size = request.get("draft_tensor_parallel_size"), parallel.tensor_parallel_size
    if draft_size not in (None, size):
        raise ConfigError(
            f"draft_tensor_parallel_size={draft_size} does not work with MSD: the draft shares the "
            f"target's embedding table and head, which are split over {size} ranks. Leave it out "
            f"or set it to {size}."
        )


def _check_settings(request: Mapping[str, Any]) -> None:
    if request.get("disable_padded_drafter_batch"):
        raise ConfigError(
            "disable_padded_drafter_batch does not work with MSD: the draft needs to know which "
            "rows of the padded batch are visual. Leave it out."
        )
    if request.get("rejection_sample_method") == "fly":
        raise ConfigError(
            "rejection_sample_method='fly' changes the output, MSD keeps it as it is without "
            "speculation. Leave it out."
        )
