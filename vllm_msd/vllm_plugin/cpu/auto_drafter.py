"""Model Runner V1's drafter where nobody gave sizes: each step drafts and verifies what pays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override
from vllm import envs
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.worker.gpu_input_batch import InputBatch

from vllm_msd.budget import (
    AcceptancePrior,
    Calibration,
    CostTable,
    DepthChooser,
    DraftPlan,
    prefix_lengths,
)
from vllm_msd.budget.costs import GREEDY
from vllm_msd.budget.depth import PROBED_NODES
from vllm_msd.tree import DraftTree, TreeConfig, TreeShape
from vllm_msd.vllm_plugin.configuration.tree_settings import auto_shapes
from vllm_msd.vllm_plugin.cpu.backlog import Backlog
from vllm_msd.vllm_plugin.cpu.step import StepNodes
from vllm_msd.vllm_plugin.cpu.tree_drafter import TreeProposer
from vllm_msd.vllm_plugin.tally import Tally

logger = init_logger("vllm.vllm_msd")


@dataclass(frozen=True)
class Forced:
    """What to draft while costs are measured: so deep, and so many nodes of each request."""

    shape: TreeConfig
    depth: int
    nodes: int


@dataclass
class Spent:
    """Seconds of the last drafting: reading the step's rows, and growing trees."""

    reading: float = 0.0
    growing: float = 0.0


class AutoProposer(TreeProposer):
    """Drafts as deep and hands over as many nodes as make the coming step the fastest.

    Attributes:
        limits: ``[R]`` the most nodes that each request of the batch may have; set before
            `propose`.
        forced: see `Forced`; None when serving.
        spent: of the last `propose`.
        plan: of the last `propose`.
        tables: what steps cost, for each shape that was chosen from.
        costs: of the chosen shape, by way of drawing.
    """

    limits: list[int]
    forced: Forced | None = None
    drafted: DraftTree | None
    tables: dict[TreeConfig, CostTable]
    costs: dict[str, CostTable]

    def __init__(self, vllm_config, device, runner=None) -> None:
        super().__init__(vllm_config, device, runner)
        self.shapes = auto_shapes(vllm_config)
        draft = vllm_config.speculative_config.draft_model_config.hf_config
        self.prior = AcceptancePrior.from_config(draft.msd_draft["msd_acceptance"])
        row_bytes = self.hidden_states.shape[1] * self.hidden_states.element_size()
        self.backlog = Backlog(len(self.hidden_states), row_bytes)
        self.calibration = Calibration(self.prior)
        self.spent = Spent()
        self.plan = DraftPlan(0)
        self.drafted = None
        self.tally = Tally(logger.info, float(envs.VLLM_LOG_STATS_INTERVAL))

    def use(self, config: TreeConfig, costs: CostTable) -> None:
        """Draft trees of this shape from now on; called before the first request."""
        self.config, self.costs = config, {}
        for way in (GREEDY, *(way for way, _ in costs.drawing)):
            self.costs[way] = costs.drawn(way)
        self.chooser = DepthChooser(config, self.calibration, self.prior)

    @override
    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: tuple[list[Tensor], Tensor] | None = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: dict[str, Tensor] | list[dict[str, Tensor]] | None = None,
    ) -> list[list[int]]:
        """Draft what pays; returns the tokens of the first nodes of each request's tree."""
        started = time.perf_counter()
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        requests = len(starts) - 1
        if token_indices_to_sample is None:
            token_indices_to_sample = common_attn_metadata.query_start_loc[1:] - 1
        last_rows = token_indices_to_sample.tolist()
        self.plan, self.drafted, self.spent = self._next_plan(requests), None, Spent()

        rows = sum(last + 1 - start for last, start in zip(last_rows, starts, strict=False))
        if self.plan.depth == 0 and not self._reads_prompts() and self.backlog.has_room(rows):
            self._owe(starts, last_rows, target_token_ids, target_hidden_states, next_token_ids)
            return [[] for _ in range(requests)]

        self._catch_up(starts, common_attn_metadata.block_table_tensor)
        super(TreeProposer, self).propose(
            min(self.plan.depth, 1),
            target_token_ids,
            target_positions,
            target_hidden_states,
            next_token_ids,
            token_indices_to_sample,
            common_attn_metadata,
            sampling_metadata,
            mm_embed_inputs,
            num_rejected_tokens_gpu,
            slot_mappings,
        )
        self.spent.reading = time.perf_counter() - started
        if self.plan.depth == 0:
            return [[] for _ in range(requests)]
        self.drafted = self._grow_all(
            next_token_ids,
            token_indices_to_sample,
            common_attn_metadata.block_table_tensor,
            _cut(self.forced.shape if self.forced else self.config, self.plan.depth),
        )
        self.spent.growing = time.perf_counter() - started - self.spent.reading
        lengths = self._lengths(self.drafted, num_speculative_tokens)
        tokens = self.drafted.tokens[:, 1:].tolist()
        return [own[:length] for own, length in zip(tokens, lengths, strict=True)]

    def learn(self, drafted: Sequence[DraftTree | None], step: StepNodes, accepted: Tensor) -> None:
        """Set what was accepted against what the draft thought of it.

        Args:
            drafted: each request's last tree, ``[1, T]``, or None.
            step: what was verified.
            accepted: ``[R, T]`` int64 the accepted nodes, padded with -1.
        """
        if self.forced is not None:
            return  # made-up requests
        starts = step.row_start.tolist()
        paths, hits = [], []
        for request, tree in enumerate(drafted):
            own = step.tokens[starts[request] + 1 : starts[request + 1]]
            if tree is None or not torch.equal(tree.tokens[0, 1 : len(own) + 1], own):
                continue
            hit = np.zeros(len(own) + 1, dtype=bool)
            hit[accepted[request][accepted[request] > 0].numpy()] = True
            paths.append(tree.scores[0, 1 : len(own) + 1].exp().numpy())
            hits.append(hit[1:])
        if not paths:
            return
        probabilities, is_hit = np.concatenate(paths), np.concatenate(hits)
        if self.plan.is_probe:
            expected = float(self.calibration.worth(probabilities).sum())
            self.chooser.probed(expected, int(is_hit.sum()))
        self.calibration.observe(probabilities, is_hit)

    def _next_plan(self, requests: int) -> DraftPlan:
        if self.forced is not None:
            return DraftPlan(self.forced.depth)
        if not any(self.limits):
            return DraftPlan(0)
        plan = self.chooser.next(requests, self._costs())
        if plan.depth == 0:
            self.tally.add(0, [])
        return plan

    def _lengths(self, tree: DraftTree, most: int) -> list[int]:
        """How many nodes of each request are verified, and note what was drafted."""
        if self.forced is not None:
            return [self.forced.nodes] * len(tree.tokens)
        probabilities = tree.scores[:, 1:].exp().double().numpy()
        depths = tree.depths[:, 1:].numpy()
        worths = self.calibration.worth(probabilities)
        for request, limit in enumerate(self.limits):
            if limit:
                self.chooser.drafted(self.plan.depth, probabilities[request], depths[request])
        lengths = prefix_lengths(
            [own[: min(limit, most)] for own, limit in zip(worths, self.limits, strict=True)],
            self._costs(),
            self.plan.depth,
            at_least=PROBED_NODES if self.plan.is_probe else 0,
        )
        self.tally.add(probabilities.shape[1], lengths)
        return lengths

    def _costs(self) -> CostTable:
        """Of steps with the requests at hand."""
        way = way_of_drawing(self.runner.input_batch)
        return self.costs.get(way, self.costs[GREEDY])

    def _reads_prompts(self) -> bool:
        """Whether the step has rows of a prompt, which may show images: they are read at once."""
        batch = self.runner.input_batch
        count = batch.num_reqs
        return bool((batch.num_computed_tokens_cpu[:count] < batch.num_prompt_tokens[:count]).any())

    def _owe(
        self,
        starts: list[int],
        last_rows: list[int],
        tokens: Tensor,
        hidden: Tensor,
        next_tokens: Tensor,
    ) -> None:
        """Leave the step's rows for later, those of accepted tokens only."""
        first = self.runner.positions[: len(tokens)]
        for request, req_id in enumerate(self.runner.input_batch.req_ids):
            begin, end = starts[request], last_rows[request] + 1
            following = torch.cat([tokens[begin + 1 : end], next_tokens[request, None]])
            self.backlog.keep(req_id, int(first[begin]), following.long(), hidden[begin:end])

    def _catch_up(self, starts: list[int], block_table: Tensor) -> None:
        """Let the draft read what these requests owe, in one pass."""
        if self.backlog.num_rows == 0:
            return
        positions = self.runner.positions[starts[:-1]]
        owed = self.backlog.take(list(self.runner.input_batch.req_ids), positions.tolist())
        if not owed:
            return
        own, rows = list(owed), list(owed.values())
        counts = torch.tensor([len(r.tokens) for r in rows])
        query_start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        at = torch.cat([torch.arange(r.first, r.end) for r in rows])
        blocks = block_table[own]
        block = blocks[torch.arange(len(rows)).repeat_interleave(counts), at // self.block_size]
        attention = CommonAttentionMetadata(
            query_start_loc=query_start,
            query_start_loc_cpu=query_start,
            seq_lens=torch.tensor([r.end for r in rows], dtype=torch.int32),
            num_reqs=len(rows),
            num_actual_tokens=len(at),
            max_query_len=int(counts.max()),
            max_seq_len=max(r.end for r in rows),
            block_table_tensor=blocks,
            slot_mapping=block.long() * self.block_size + at % self.block_size,
        )
        tokens, hidden = (torch.cat([getattr(r, x) for r in rows]) for x in ("tokens", "hidden"))
        self._run_level(tokens, hidden, at, attention, None)


def way_of_drawing(batch: InputBatch) -> str:
    """How the rows of a step become tokens: one request's way is done to all rows."""
    if batch.all_greedy:
        return GREEDY
    if not batch.no_top_p:
        return "top-p"
    return "drawn" if batch.no_top_k else "top-k"


def _cut(config: TreeConfig, depth: int) -> TreeShape:
    """The shape of a tree that goes only so deep."""
    k = config.top_k
    nodes = min(config.num_nodes, k + (depth - 1) * k * k)
    return TreeShape(nodes + 1, depth - 1, k)
