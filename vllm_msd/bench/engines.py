"""The engines of a run, one an arm: all of them in this process, or one after another."""

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_msd.bench.arms import NONE, Arm
from vllm_msd.bench.drive import run_cell
from vllm_msd.bench.replay import install, synthetic_rates
from vllm_msd.bench.settings import BenchSettings
from vllm_msd.budget import ratio_for
from vllm_msd.errors import ConfigError
from vllm_msd.measure.engine import Engine, timed_dtype
from vllm_msd.measure.inputs import Sample, warm_up_of

USUAL_LENGTH = 4096  # of a request with its images, where the model takes so much
_ROOM = 1024  # tokens that each running request has room for on a CPU, and one of full length
GIB = 2**30
_ROOM_BESIDE = 3 * GIB // 2  # the process, its libraries and a prompt's activations


@dataclass(frozen=True)
class Models:
    """What is measured: folders or hub names, and what vLLM computes in.

    weights: bytes of a target that has no files, and of its draft.
    """

    target: str
    draft: str | None
    dtype: str
    weights: int = 0


def on_gpu() -> bool:
    """Whether vLLM's engines of this process run on a GPU."""
    import torch

    return torch.cuda.is_available()


def models_of(settings: BenchSettings) -> Models:
    """The models of a run; the demo pair is widened if that was asked for.

    Raises:
        CheckpointError, ConfigError: they are not there.
    """
    dtype = settings.dtype
    if dtype == "auto" and not on_gpu():
        dtype = timed_dtype()
    if settings.shape is not None:
        return _shape_models(settings, settings.shape, "bfloat16" if dtype == "auto" else dtype)
    if settings.target is not None:
        target, draft = os.path.expanduser(settings.target), None
        if any(arm.is_msd for arm in settings.parsed_arms):
            from vllm_msd.vllm_plugin.configuration.resolve import find_draft

            draft = find_draft(target, settings.draft)
        return Models(target, draft, dtype)
    from vllm_msd.demo.paths import demo_pair, wide_pair

    if settings.wide is None:
        pair = demo_pair()
        dtype = "float32" if settings.dtype == "auto" else dtype
    else:
        dtype = "bfloat16" if dtype == "auto" else dtype
        pair = wide_pair(settings.wide, dtype=dtype, report=lambda line: print(line, flush=True))
    return Models(str(pair.target), str(pair.draft), dtype)


def _shape_models(settings: BenchSettings, shape: str, dtype: str) -> Models:
    """Raises ConfigError where they do not fit, before anything is written."""
    from vllm_msd.bench.true_shapes import language_shape, true_pair, weight_bytes

    weights, language = weight_bytes(shape, dtype), language_shape(shape)
    element = 4 if dtype == "float32" else 2
    per_token = (language.layers + 1) * language.kv_bytes * element // language.element_bytes
    cache = _cache_bytes(settings, settings.max_model_len or USUAL_LENGTH, per_token)
    needed, there = weights + cache + _ROOM_BESIDE, _memory()
    if needed > there:
        raise ConfigError(
            f"--shape {shape} in {dtype} needs {needed / GIB:.1f} GiB: weights "
            f"{weights / GIB:.1f}, KV cache {cache / GIB:.1f}, the rest {_ROOM_BESIDE / GIB:.1f}; "
            f"this machine has {there / GIB:.1f}. Give a smaller shape, --dtype bfloat16, or a "
            "smaller --batch or --max-model-len."
        )
    print(f"{shape} with random weights: {weights / GIB:.2f} GiB in {dtype}", flush=True)
    target, draft = true_pair(shape, dtype)
    return Models(str(target), str(draft), dtype, weights)


class Engines:
    """Starts an arm's engine when it is asked for.

    Together they take turns on the same cores; on a CPU they hold the target once. Apart, each is
    closed before the next one starts.
    """

    def __init__(self, settings: BenchSettings, models: Models, samples: Sequence[Sample]) -> None:
        self._settings, self._models = settings, models
        self._arms = {arm.name: arm for arm in settings.parsed_arms}
        self._warm_up = warm_up_of(samples)
        self._options = _options(settings, models, samples)
        self._open: dict[str, Engine] = {}
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None

    @property
    def shared(self) -> bool:
        """Whether the engines hold one copy of the target: not where graphs keep its address."""
        settings = self._settings
        is_eager = not (on_gpu() or settings.compile)
        return settings.engines == "together" and is_eager

    def get(self, name: str) -> Engine:
        """The engine of an arm, warm.

        Raises:
            ConfigError: vLLM does not start with these settings.
        """
        if name not in self._open:
            if self._settings.engines == "apart":
                self.close()
            if self.shared and name != NONE:
                self.get(NONE)
            self._open[name] = self._start(self._arms[name])
        return self._open[name]

    def close(self) -> None:
        """Shut all of them down."""
        while self._open:
            self._open.popitem()[1].close()
            gc.collect()  # an engine refers to itself in circles
            if self._cores is not None:
                os.sched_setaffinity(0, self._cores)  # an engine binds the process to some

    def _start(self, arm: Arm) -> Engine:
        config = arm.speculative_config(self._models.draft)
        options = dict(self._options)
        _mend_llvmlite()
        if config is not None:
            options["speculative_config"] = config
        if self._settings.shape is not None:
            self._take_random_weights(arm, options)
        try:
            engine = Engine(self._models.target, dtype=self._models.dtype, **options)
        except ValueError as error:
            raise ConfigError(f"{arm.name} ({arm}): {_first_reason(error)}") from error
        if self.shared and arm.name != NONE:
            engine.share_target(self._open[NONE])
        if self._settings.shape is not None and arm.is_msd:
            ratio = ratio_for(self._settings.accepted)
            install(engine.model_runner, arm, ratio, self._settings.seed)
        # The first request pays for lazy set-up.
        run_cell(
            engine, [engine.prompt(self._warm_up)], 1, 0, temperature=0.0, max_tokens=16, seed=0,
            fixed_length=self._settings.shape is not None,
        )  # fmt: skip
        return engine

    def _take_random_weights(self, arm: Arm, options: dict[str, Any]) -> None:
        options["load_format"] = "dummy"
        if not arm.is_msd:
            return
        from vllm_msd.vllm_plugin.configuration.auto_sizes import runs_v1_on_cpu

        written = {"load_format": "auto", "use_tqdm_on_load": False}
        config = {**options["speculative_config"], "draft_load_config": written}
        if arm.method == "chain" and not runs_v1_on_cpu():
            config |= synthetic_rates(arm, ratio_for(self._settings.accepted))
        options["speculative_config"] = config


def _mend_llvmlite() -> None:
    """Let an engine start where numba is loaded, which vLLM's ngram does.

    A starting engine looks into every object of every module (vLLM 0.32 and 0.33, on a CPU).
    llvmlite's library answers to any name, ``__dict__`` too, with a function; here with a dict.
    """
    if (ffi := sys.modules.get("llvmlite.binding.ffi")) is not None:
        ffi.lib._fntab["__dict__"] = {}


def _first_reason(error: ValueError) -> str:
    """The text of an error, of pydantic's the reason alone."""
    details = getattr(error, "errors", None)
    if callable(details) and (found := details()):
        return str(found[0].get("msg", error)).removeprefix("Value error, ")
    return str(error)


def _options(settings: BenchSettings, models: Models, samples: Sequence[Sample]) -> dict[str, Any]:
    """Engine arguments that all arms have in common."""
    from transformers import AutoConfig

    try:
        text = AutoConfig.from_pretrained(models.target).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--target: {models.target} cannot be read: {error}") from error
    longest = getattr(text, "max_position_embeddings", USUAL_LENGTH)
    length = settings.max_model_len or min(longest, USUAL_LENGTH)
    options: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": max(settings.batch),
        "limit_mm_per_prompt": {"image": max(1, *(len(one.images) for one in samples))},
        # A second pass must do again what the first one did: nothing of a picture is kept.
        "mm_processor_cache_gb": 0,
    }
    options["enforce_eager"] = not (on_gpu() or settings.compile)
    if on_gpu() and settings.engines == "apart":
        return options | {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.9}
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    element = 4 if models.dtype == "float32" else 2
    per_token = 2 * (text.num_hidden_layers + 1) * heads * size * element  # 1: the draft's layer
    cache = _cache_bytes(settings, length, per_token)
    if not on_gpu():
        check_memory(settings, models, cache, length)
    options["kv_cache_memory_bytes"] = cache
    return options


def _cache_bytes(settings: BenchSettings, length: int, per_token: int) -> int:
    """Of an engine's KV cache, where it is not what memory is left."""
    return max(256 << 20, (length + max(settings.batch) * min(length, _ROOM)) * per_token)


def _memory() -> int:
    """Bytes of the device's memory, on a CPU of the machine's."""
    if on_gpu():
        import torch

        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(settings: BenchSettings, models: Models, cache: int, length: int) -> None:
    """Refuse what this machine has no memory for, before an engine starts.

    Args:
        settings, models: of the run, on a CPU.
        cache: bytes of an engine's KV cache.
        length: tokens of the longest request.

    Raises:
        ConfigError: caches and weights take more than there is.
    """
    engines = len(settings.parsed_arms) if settings.engines == "together" else 1
    copies = engines if settings.compile else 1  # compiled, they do not share the target
    target = Path(models.target)
    weights = models.weights or sum(
        file.stat().st_size for file in target.glob("*.safetensors")
    )  # 0 of the hub's
    needed, there = engines * cache + copies * weights, _memory()
    if needed > there:
        raise ConfigError(
            f"--batch: got {max(settings.batch)}, for which the KV caches of {engines} engines at "
            f"a time, {cache / GIB:.1f} GiB each for requests of up to {length} tokens, and the "
            f"target's weights take {needed / GIB:.1f} GiB; this machine has {there / GIB:.1f}. "
            "Give smaller --batch, a smaller --max-model-len, or --engines apart."
        )
