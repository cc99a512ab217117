"""One vLLM engine inside this process, driven step by step so that every token's origin is known.

Two such engines can live in one process. They compute only when asked, so runs with and without
MSD can alternate on the same cores, which two vLLM processes cannot (both bind to the same ones).
"""

import importlib.util
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_msd.cpu_environment import tuned
from vllm_msd.errors import VLLM_MISSING, MSDError
from vllm_msd.measure.inputs import Sample

KV_CACHE_BYTES = 256 * 2**20
_MARK = "MSD_MEASURE_PROCESS"


def restart_tuned() -> None:
    """Start this process again with what vLLM needs in the environment before Python starts.

    See `vllm_msd.cpu_environment`. Both cores work for the engine, which runs in this process. Does
    nothing in the process so started.

    Raises:
        MSDError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MSDError(VLLM_MISSING)
    if os.environ.get(_MARK):
        return
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    } | dict(os.environ)
    env[_MARK] = "1"
    env |= tuned(env)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def timed_dtype() -> str:
    """What the widened pair is timed in: ``bfloat16`` where it is computed in, else ``float32``.

    A processor that emulates bf16 spends as much on every row as on the first, so that neither
    answer to the question "what does checking more rows cost" would be a real model's.
    """
    import torch

    in_bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if in_bf16 else "float32"


SHORT = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Drafting:
    """What is drafted for a verification: a chain of tokens, or with depth and top_k a tree.

    ``num_tokens`` of a tree are its nodes, the root not counted.
    """

    num_tokens: int = 5
    depth: int | None = None
    top_k: int | None = None

    @property
    def is_tree(self) -> bool:
        """Whether a node can have several children."""
        return self.top_k not in (None, 1)

    def __str__(self) -> str:
        if not self.is_tree:
            return f"chain of {self.num_tokens}"
        return f"tree of {self.num_tokens} nodes, depth {self.depth}, top-k {self.top_k}"

    @property
    def deepest(self) -> int:
        """How many drafted tokens a verification can accept."""
        return self.depth or self.num_tokens

    def speculative_config(self, draft: Path) -> dict[str, Any]:
        """vLLM's ``speculative_config``."""
        config = {"method": "msd", "model": str(draft), "num_speculative_tokens": self.num_tokens}
        if self.depth is not None:
            config |= {"tree_depth": self.depth, "tree_top_k": self.top_k}
        return config


@dataclass(frozen=True)
class VerifiedTree:
    """One verification of a tree; node 0 is the root, parents come before children.

    ``path`` are the root and the accepted nodes, ``drawn`` the target's token after each of them.
    ``before`` counts the answer's tokens up to the root, the root included.
    """

    tokens: list[int]
    parents: list[int]
    path: list[int]
    drawn: list[int]
    before: int


@dataclass
class Answer:
    """What one request got, and how.

    ``accepted[i]`` says whether token i came from an accepted draft; ``steps`` holds, per engine
    step that emitted tokens, their number and the time since the request was added (s).
    """

    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    steps: list[tuple[int, float]] = field(default_factory=list)
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    trees: list[VerifiedTree] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The answer in full."""
        return "".join(self.pieces)

    @property
    def prefill_seconds(self) -> float:
        """Time to the first token."""
        return self.steps[0][1]

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the last."""
        return self.steps[-1][1] - self.steps[0][1]

    @property
    def decode_tokens(self) -> int:
        """Tokens emitted after the first step, which is the prompt's."""
        return len(self.token_ids) - self.steps[0][0]


class Engine:
    """vLLM on one model, with MSD when ``draft`` is given, answering one sample at a time.

    ``keep_trees`` fills `Answer.trees`, which takes a little time in every step and wants each step
    done before the next begins. ``options`` are further `vllm.EngineArgs`. The chat template and
    the tokenizer are the model's.
    """

    def __init__(
        self,
        target: Path | str,
        *,
        draft: Path | None = None,
        drafting: Drafting = Drafting(),
        dtype: str = "float32",
        keep_trees: bool = False,
        **options: Any,
    ) -> None:
        from transformers import AutoProcessor, AutoTokenizer
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self._keep_trees = keep_trees and draft is not None and drafting.is_tree
        if draft is not None:
            options["speculative_config"] = drafting.speculative_config(draft)
        if self._keep_trees:
            options["async_scheduling"] = False
        # Eager: nothing to compile, so no C++ compiler is needed and both engines start at once.
        # No prefix cache: a second round must compute what the first one did.
        defaults = {
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "limit_mm_per_prompt": {"image": 4},
            "gpu_memory_utilization": 0.4,
            "use_tqdm_on_load": False,
            "seed": 0,
        }
        self.tokenizer = self._template = AutoTokenizer.from_pretrained(target)
        if self.tokenizer.chat_template is None:  # some models keep it with their processor
            self._template = AutoProcessor.from_pretrained(target)
        self._record = _spec_decoding_recorder()
        args = EngineArgs(model=str(target), dtype=dtype, **(defaults | options))
        self.llm = LLMEngine.from_engine_args(args, stat_loggers=[self._record])
        self._count = 0
        self._verified: list[tuple] = []  # of the last step: tokens, parents, AcceptedPaths
        if self._keep_trees:
            runner = self.model_runner
            self._watch(getattr(runner, "store", None) or runner.model_state.store)

    def _watch(self, store: Any) -> None:
        """Look at what a `vllm_msd.tree.TreeStore` accepts."""
        accept = store.accept

        def watching(slots: Any, row_start: Any, drawn: Any, tokens: Any) -> Any:
            found = accept(slots, row_start, drawn, tokens)
            self._verified[:] = [(tokens, store.parents[slots], found)]
            return found

        store.accept = watching

    @property
    def model_runner(self) -> Any:
        """vLLM's model runner, for experiments that look inside."""
        return self.llm.model_executor.driver_worker.worker.model_runner

    @property
    def dtype(self) -> str:
        """What the target is computed in: ``auto`` is settled when the engine has started."""
        return str(self.llm.vllm_config.model_config.dtype).removeprefix("torch.")

    def step(self) -> tuple[list[Any], Any]:
        """One engine step: vLLM's outputs, and its figures of speculation (None: no drafts)."""
        self._record.take()
        outputs = self.llm.step()
        return outputs, self._record.take()

    def close(self) -> None:
        """Shut the engine down, so that another one has its memory and cores."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def share_target(self, other: "Engine") -> None:
        """Take over another engine's target weights, which must be the same, and drop the own.

        On a CPU vLLM keeps packed weights inside its linear layers' own matrix product.
        """
        models = (self.model_runner.model, other.model_runner.model)
        for mine, theirs in zip(*(model.modules() for model in models), strict=True):
            for name, parameter in theirs.named_parameters(recurse=False):
                getattr(mine, name).data = parameter.data
            if hasattr(theirs, "cpu_linear"):
                mine.cpu_linear = theirs.cpu_linear

    def prompt(self, sample: Sample) -> dict[str, Any]:
        """vLLM's prompt of a sample."""
        ids = self._template.apply_chat_template(
            sample.prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if sample.images:
            prompt["multi_modal_data"] = {"image": sample.images}
        return prompt

    def answer(self, sample: Sample, max_tokens: int = 192) -> Answer:
        """Answer one sample greedily, alone in the engine."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA
        )
        self._count += 1
        answer = Answer()
        start = time.perf_counter()
        self.llm.add_request(str(self._count), self.prompt(sample), params)
        while self.llm.has_unfinished_requests():
            self._record.take()
            for output in self.llm.step():
                self._add(answer, output.outputs[0], time.perf_counter() - start)
        text = ""
        for count in range(1, len(answer.token_ids) + 1):  # a character may span tokens
            longer = self.tokenizer.decode(answer.token_ids[:count], skip_special_tokens=True)
            answer.pieces.append(longer[len(text) :])
            text = longer
        return answer

    def _verified_tree(self, before: list[int]) -> VerifiedTree | None:
        """The tree of the step just done, with one request in it; None if it verified none.

        ``before`` are the answer's tokens up to the root, which the runner may not write down.
        """
        if not self._verified:
            return None
        tokens, parents, accepted = self._verified.pop()
        size, length = len(tokens), int(accepted.lengths[0]) + 1
        return VerifiedTree(
            [before[-1], *tokens[1:].tolist()],
            parents[0, :size].tolist(),
            accepted.nodes[0, :length].tolist(),
            accepted.tokens[0, :length].tolist(),
            len(before),
        )

    def _add(self, answer: Answer, delta: Any, seconds: float) -> None:
        new = list(delta.token_ids)
        answer.finish_reason = delta.finish_reason or answer.finish_reason
        stats = self._record.take()
        accepted = 0
        if stats is not None:
            accepted = stats.num_accepted_tokens
            answer.num_drafts += stats.num_drafts
            answer.num_draft_tokens += stats.num_draft_tokens
            answer.num_accepted_tokens += accepted
            per_position = stats.num_accepted_tokens_per_pos
            before = answer.accepted_per_position or [0] * len(per_position)
            answer.accepted_per_position = [
                a + b for a, b in zip(before, per_position, strict=True)
            ]
        if self._keep_trees and (tree := self._verified_tree(answer.token_ids)) is not None:
            answer.trees.append(tree)
        if new:
            # The target's own token comes last; a stop may have cut it and some accepted ones off.
            answer.token_ids += new
            answer.accepted += [index < accepted for index in range(len(new))]
            answer.steps.append((len(new), seconds))


def _spec_decoding_recorder() -> Any:
    """A vLLM stat logger that keeps the last step's speculative decoding figures."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Recorder(StatLoggerBase):
        def __init__(self) -> None:
            self.last = None

        def __call__(self, vllm_config, engine_index: int = 0) -> "Recorder":
            return self  # vLLM asks for a factory

        def record(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0):
            if scheduler_stats is not None:
                self.last = scheduler_stats.spec_decoding_stats

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

        def take(self) -> Any:
            """The figures of the last step, once."""
            last, self.last = self.last, None
            return last

    return Recorder()
