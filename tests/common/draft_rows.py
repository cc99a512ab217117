"""The draft's own numbers inside vLLM: token equality cannot show a draft that reads wrong rows.

Every row of every draft prefill is recorded under (request, position) while vLLM serves mixed
requests: its input embedding, hidden state, branch and output, and the logits that drafting starts
from. Afterwards the same sequences go through Hugging Face's target and ``vllm_msd.draft.MSDDraft``
in one piece, and each row must agree; so must the drafted chains or trees. A wrong mask, position,
shift, chunk end, or gather of an accepted path shows in the outputs, there or in every row that
attends to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.common.chain_identity import Run, engine_options, greedy, require_runner
from tests.common.draft_oracle import Oracle
from tests.common.fp32_engine import open_engine, running_engine
from tests.common.tree_mutations import mutated
from vllm_msd.tree import TreeConfig


@dataclass
class Recorder:
    """Wraps the drafter of an in-process engine, Model Runner V1's or V2's."""

    rows: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)
    # Drafted tokens, and parents where they are a tree's nodes.
    drafts: dict[tuple[str, int], tuple[list[int], list[int] | None]] = field(default_factory=dict)
    batch: tuple[list[str], list[int] | Tensor, Tensor | None] | None = (
        None  # ids, starts, last rows
    )
    last: list[tuple[str, int]] | None = None  # of the rows whose logits come next

    def attach(self, model_runner: Any) -> None:
        is_v2 = hasattr(model_runner, "speculator")
        drafter = model_runner.speculator if is_v2 else model_runner.drafter
        propose, forward, draft = drafter.propose, drafter.model.forward, drafter.model
        column_logits = draft.column_logits

        def parents_v1(_: Any) -> Tensor | None:
            return drafter.drafted.parents if hasattr(drafter, "drafted") else None

        def parents_v2(input_batch: Any) -> Tensor | None:
            store = getattr(drafter.model_state, "store", None)
            return None if store is None else store.parents[input_batch.idx_mapping]

        def propose_v1(**arguments: Any) -> Tensor:
            starts = arguments["common_attn_metadata"].query_start_loc_cpu.tolist()
            last = arguments["token_indices_to_sample"]
            last = torch.tensor(starts[1:]) - 1 if last is None else last
            return self.record_drafts(
                model_runner.input_batch.req_ids,
                starts,
                last,
                lambda: propose(**arguments),
                lambda: parents_v1(None),
            )

        def propose_v2(input_batch: Any, *arguments: Any, **named: Any) -> Tensor:
            # Rows are known only once propose() has prepared its inputs: read them late.
            return self.record_drafts(
                input_batch.req_ids,
                drafter.input_buffers.query_start_loc,
                drafter.last_token_indices,
                lambda: propose(input_batch, *arguments, **named),
                lambda: parents_v2(input_batch),
            )

        def recording_forward(
            input_ids: Tensor | None,
            positions: Tensor,
            hidden_states: Tensor,
            inputs_embeds: Tensor,
        ) -> tuple[Tensor, Tensor]:
            outputs = forward(input_ids, positions, hidden_states, inputs_embeds)
            if self.batch is not None:
                ids, starts, last = self.batch
                self.batch = None
                for i, request in enumerate(ids):
                    for row in range(int(starts[i]), int(last[i]) + 1):
                        self.rows[external(request), int(positions[row])] = {
                            "embed": inputs_embeds[row].clone(),
                            "hidden": hidden_states[row].clone(),
                            "visual": draft.is_visual[row].clone(),
                            "output": outputs[0][row].clone(),
                        }
                self.drafted_from = self.last = [
                    (external(request), int(positions[int(last[i])]))
                    for i, request in enumerate(ids)
                ]
            return outputs

        def recording_logits(hidden_states: Tensor) -> Tensor:
            logits = column_logits(hidden_states)
            if self.last is not None:  # the first of a proposal: one row for each request
                for key, row in zip(self.last, logits, strict=True):
                    self.rows[key]["logits"] = row.clone()
                self.last = None
            return logits

        drafter.propose = propose_v2 if is_v2 else propose_v1
        drafter.model.forward = recording_forward
        drafter.model.column_logits = recording_logits

    def record_drafts(
        self, ids: Any, starts: list[int] | Tensor, last: Tensor, propose: Any, parents: Any
    ) -> Tensor:
        """Run one propose() and keep what is drafted for each request."""
        self.batch = (list(ids), starts, last)
        tokens = propose()
        drafted = tokens.tolist()
        above = [None] * len(drafted) if parents() is None else parents().tolist()
        for key, *draft in zip(self.drafted_from, drafted, above, strict=True):
            if set(draft[0]) != {-1}:  # vLLM 0.33 asks for none where none could be accepted
                self.drafts[key] = tuple(draft)
        return tokens

    def clear(self) -> None:
        """Forget what was recorded."""
        self.rows.clear()
        self.drafts.clear()


def external(request_id: str) -> str:
    """The id that the caller sees; vLLM appends a random suffix to it."""
    return request_id.split("-")[0]


def draft_rows(
    *,
    runner: str,
    kind: str,
    target: str,
    draft: str,
    faults: list[str] | None = None,
    tree: list[int] | None = None,
) -> dict[str, Any]:
    """Serve, record, recompute, compare; then again with the engine broken in known ways.

    Args:
        runner: "v1" or "v2".
        kind: of the tiny pair.
        target, draft: its folders.
        faults: names in ``FAULTS`` or `tree_mutations.MUTATIONS`; those of ``FAULTS`` are for Model
            Runner V1 only, but for "mask".
        tree: nodes, depth and width, instead of chains of 5. The rows are then compared with those
            of an engine that drafts chains, too.

    Returns:
        `compare`'s figures, and under ``faults`` those of each broken run; with ``tree`` also the
        largest differences from the chain engine's rows, under ``from_chains``.
    """
    started = time.perf_counter()
    options = engine_options(kind) | {"num_gpu_blocks_override": 60}  # no preemption
    oracle, chain_rows = Oracle(kind, target, draft), {}
    config = TreeConfig(*tree) if tree else TreeConfig(5, 5, 1)
    if tree:
        with running_engine(target, draft, 5, **options) as engine:
            chains = recorder_of(engine, runner)
            serve(Run(engine, kind, {}))
            chain_rows = chains.rows
    engine = open_engine(
        target, draft, config.num_nodes, tree=tree and (config.depth, config.top_k), **options
    )
    recorder = recorder_of(engine, runner)
    run = Run(engine, kind, {})
    report = compare(serve(run), recorder, oracle, config)
    report["from_chains"] = row_differences(chain_rows, recorder.rows)
    report["faults"] = {}
    for fault in faults or []:
        recorder.clear()
        engine.reset_prefix_cache()
        breaking = (
            FAULTS[fault](model_runner_of(engine)) if fault in FAULTS else mutated(runner, fault)
        )
        with breaking:
            report["faults"][fault] = compare(serve(run), recorder, oracle, None)
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def model_runner_of(engine: Any) -> Any:
    """The model runner of an in-process engine."""
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner


def recorder_of(engine: Any, runner: str) -> Recorder:
    """A recorder attached to the engine, which must use the model runner named."""
    require_runner(engine, runner)
    recorder = Recorder()
    recorder.attach(model_runner_of(engine))
    return recorder


def row_differences(expected: dict, got: dict) -> dict[str, float]:
    """The number of rows that both runs recorded, and the largest difference of each quantity."""
    common = expected.keys() & got.keys()
    found: dict[str, float] = {"rows": len(common)}
    for key in common:
        for name in expected[key].keys() & got[key].keys() - {"visual"}:
            if name == "hidden" and bool(got[key]["visual"]):
                continue  # a visual row ignores its hidden state
            difference = float((expected[key][name] - got[key][name]).abs().max())
            found[name] = max(found.get(name, 0.0), difference)
    return found


def serve(run: Run) -> list[tuple[dict, Any]]:
    """Prompts and outputs: chunks, several images, then a batch that hits the prefix cache."""
    long = "text that fills more than one block of the cache, to be found again later on: "
    first = [
        run.prompt("a request without an image but with several chunks to it " * 2),
        run.prompt("thirty-five characters before it: {} and {} after it", 1, 2),
        run.prompt("{} " + long + "and {} {}", 3, 4, 5),
        run.prompt("short {}", 6),
    ]
    second = [run.prompt("{} " + long + "and something else {}", 3, 7)]
    served = []
    for batch in (first, second):
        outputs = run.engine.generate(batch, greedy(max_tokens=24), use_tqdm=False)
        served += zip(batch, outputs, strict=True)
    return served


@torch.inference_mode()
def compare(
    served: list[tuple[dict, Any]],
    recorder: Recorder,
    oracle: Oracle,
    config: TreeConfig | None,
) -> dict[str, Any]:
    """Counts, and the largest difference of each recorded quantity over all rows.

    ``config`` is the drafts' size; without it they are not looked at.
    """
    report: dict[str, Any] = dict.fromkeys(
        ("rows", "visual_rows", "missing", "wrong_branch", "drafts", "wrong_drafts"), 0
    )
    report["cached_tokens"] = served[-1][1].num_cached_tokens
    largest = report["largest"] = {"embed": 0.0, "hidden": 0.0, "output": 0.0, "logits": 0.0}
    for prompt, output in served:
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        images = prompt.get("multi_modal_data", {}).get("image", [])
        rows, outputs = oracle.draft_rows(ids, *oracle.target_rows(ids, images))
        # Nothing is drafted after the last token, and the last step may have begun 6 before it.
        for position in range(output.num_cached_tokens, len(ids) - 7):
            row = recorder.rows.get((output.request_id, position))
            if row is None:
                report["missing"] += 1
                continue
            is_visual = bool(rows.visual_mask[0, position])
            report["rows"] += 1
            report["visual_rows"] += is_visual
            report["wrong_branch"] += bool(row["visual"]) != is_visual
            wanted = {"embed": rows.token_embeds[0, position], "output": outputs[position]}
            if not is_visual:  # a visual row ignores its hidden state
                wanted["hidden"] = rows.hidden_states[0, position]
            if "logits" in row:
                wanted["logits"] = oracle.model.lm_head(outputs[position])
            for name, value in wanted.items():
                largest[name] = max(largest[name], float((row[name] - value).abs().max()))
        for position in range(len(output.prompt_token_ids) - 1, len(ids) - 1):
            drafted = recorder.drafts.get((output.request_id, position))
            if drafted is None or config is None:
                continue
            report["drafts"] += 1
            if config.is_chain:
                wanted = oracle.chain(rows, outputs, position, config.num_nodes), None
            else:
                wanted = oracle.tree(rows, position, ids[position + 1], config)
            report["wrong_drafts"] += drafted != wanted
    return report


# Faults, to see that the comparison finds them -----------------------------------------------


@contextmanager
def ignored_mask(model_runner: Any) -> Iterator[None]:
    """Every row takes the text branch."""
    draft = (getattr(model_runner, "speculator", None) or model_runner.drafter).model
    embed = draft.embed_input_ids

    def embed_input_ids(*arguments: Any, **named: Any) -> Tensor:
        embeds = embed(*arguments, **named)
        draft.is_visual.zero_()
        return embeds

    draft.embed_input_ids = embed_input_ids
    yield
    del draft.embed_input_ids


def stock(name: str) -> Any:
    """vLLM's own method of the V1 drafter in place of the mended one."""

    @contextmanager
    def undone(model_runner: Any) -> Iterator[None]:
        from vllm.v1.spec_decode.eagle import EagleProposer

        drafter = model_runner.drafter
        setattr(drafter, name, getattr(EagleProposer, name).__get__(drafter))
        yield
        delattr(drafter, name)

    return undone


FAULTS = {
    "mask": ignored_mask,
    "positions": stock("set_inputs_first_pass"),
    "chunk_end": stock("prepare_next_token_ids_padded"),
}
