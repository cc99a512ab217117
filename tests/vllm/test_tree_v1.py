"""Trees under Model Runner V1 without an engine: a step's trees, its draws, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from tests.common.distribution import chi_square
from vllm_msd.errors import ConfigError
from vllm_msd.tree import DraftTree, TreeStore
from vllm_msd.vllm_plugin import plugin

PARENTS = torch.tensor([-1, 0, 0, 1, 1, 2, 3])
TOKENS = torch.tensor([0, 4, 7, 2, 9, 2, 5])
TREE = DraftTree.from_parents(TOKENS[None], PARENTS[None])
VOCAB = 12


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


def spec_metadata(drafts: list[list[int]], prompt_rows: list[int] | None = None):
    """vLLM's record of a step in which each request has some prompt rows before its root."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    counts = torch.tensor([len(d) for d in drafts])
    ends = (counts + 1).cumsum(0)
    rows, position = [], 0
    for count, before in zip(counts.tolist(), prompt_rows or [0] * len(drafts), strict=True):
        position += before
        rows += range(position, position + count + 1)
        position += count + 1
    last = ends - 1
    return SpecDecodeMetadata(
        draft_token_ids=torch.tensor([t for d in drafts for t in d], dtype=torch.int32),
        num_draft_tokens=counts.tolist(),
        cu_num_draft_tokens=counts.cumsum(0).int(),
        cu_num_sampled_tokens=ends.int(),
        target_logits_indices=torch.tensor([i for i in range(int(ends[-1])) if i not in last]),
        bonus_logits_indices=last.int(),
        logits_indices=torch.tensor(rows, dtype=torch.int32),
    )


def sampling_metadata(num_requests: int, bias: dict | None = None, min_p=None, **overrides):
    """Sampling parameters of a batch, one value per request."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import (
        BatchUpdate,
        LogitBiasLogitsProcessor,
        LogitsProcessors,
        MinPLogitsProcessor,
    )
    from vllm.v1.sample.metadata import SamplingMetadata

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=num_requests))
    processors = [make(config, torch.device("cpu"), False) for make in
                  (LogitBiasLogitsProcessor, MinPLogitsProcessor)]  # fmt: skip
    params = [
        SamplingParams(
            logit_bias=bias if bias is None else bias.get(i, {}),
            min_p=0.0 if min_p is None else min_p[i],
        )
        for i in range(num_requests)
    ]
    update = BatchUpdate(
        num_requests, removed=[], added=[(i, p, [], []) for i, p in enumerate(params)], moved=[]
    )
    for processor in processors:
        processor.update_state(update)
    ones = torch.ones(num_requests)
    settings = {
        "temperature": ones,
        "all_greedy": False,
        "all_random": True,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": 0 * ones,
        "presence_penalties": 0 * ones,
        "repetition_penalties": ones,
        "output_token_ids": [[] for _ in range(num_requests)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(processors),
        "spec_token_ids": [[] for _ in range(num_requests)],
    }
    return SamplingMetadata(**{**settings, **overrides})


def tree_sampler(metadata, drafted, logprobs_mode: str = "raw_logprobs"):
    from vllm.v1.sample.sampler import Sampler

    from vllm_msd.vllm_plugin.cpu.sampler import TreeRejectionSampler
    from vllm_msd.vllm_plugin.cpu.step import StepNodes

    store = TreeStore(len(drafted), 0, len(TOKENS))
    sampler = TreeRejectionSampler(Sampler(logprobs_mode), store)
    sampler.step = StepNodes.build(store, metadata, drafted)
    return sampler


# The trees of a step ----------------------------------------------------------------------------


def test_step_finds_each_requests_tree():
    """Whole, cut short, without drafts, of another draft, and unknown; prompt rows stand before."""
    from vllm_msd.vllm_plugin.cpu.step import StepNodes

    tokens = TOKENS[1:].tolist()
    other = [*tokens[:2], 8, *tokens[3:]]
    store = TreeStore(5, 0, len(TOKENS))
    step = StepNodes.build(
        store,
        spec_metadata([tokens, tokens[:3], [], other, tokens], prompt_rows=[0, 5, 9, 0, 0]),
        [TREE] * 4 + [None],
    )
    num_nodes = step.row_start.diff()
    assert num_nodes.tolist() == [7, 4, 1, 7, 7]
    is_tree = [bool(shift.any()) for shift in step.shift.split(num_nodes.tolist())]
    assert is_tree == [True, True, False, False, False]
    assert step.has_trees
    assert store.parents[0].tolist() == PARENTS.tolist()
    assert store.parents[1, :4].tolist() == PARENTS[:4].tolist()
    for request in (3, 4):
        assert store.parents[request].tolist() == list(range(-1, 6))
    assert step.rows[step.row_start[:-1]].tolist() == [0, 12, 25, 26, 33]
    assert step.row_start.tolist() == [0, 7, 11, 12, 19, 26]
    assert step.rows.tolist() == [*range(7), *range(12, 16), *range(25, 40)]
    # depths 0 1 1 2 2 2 3 against node numbers
    assert step.shift.tolist() == [0, 0, -1, -1, -2, -3, -3, 0, 0, -1, -1] + [0] * 15
    sizes = num_nodes.tolist()
    assert step.slots.tolist() == [r for r, size in enumerate(sizes) for _ in range(size)]
    assert step.nodes.tolist() == [node for size in sizes for node in range(size)]
    assert step.tokens.tolist() == [-1, *tokens, -1, *tokens[:3], -1, -1, *other, -1, *tokens]


def test_cut_to_a_chain_is_no_tree():
    """The beginning of a tree may be a chain: then the step needs no tree at all."""
    from vllm_msd.vllm_plugin.cpu.step import StepNodes

    metadata = spec_metadata([[4]])
    assert not StepNodes.build(TreeStore(1, 0, len(TOKENS)), metadata, [TREE]).has_trees


# Draws ------------------------------------------------------------------------------------------


def warped(logits, bias, temperature, min_p, top_k, top_p):
    """The distribution that vLLM samples from without speculation, by its definition."""
    logits = logits.clone()
    for token, value in bias.items():
        logits[token] += value
    logits = logits / temperature
    p = logits.softmax(-1)
    logits[p < min_p * p.max()] = -torch.inf
    logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    p, order = logits.softmax(-1).sort()
    cut = p.cumsum(0) <= 1 - top_p
    cut[-1] = False
    logits[order[cut]] = -torch.inf
    return logits.softmax(-1)


def test_tokens_are_distributed_as_without_speculation():
    """Two kinds of requests in turn, one greedy; every token's distribution given the one before.

    Bias, temperature, min-p, top-k and top-p all change the distribution of the sampled ones.
    """
    count = 20000
    torch.manual_seed(3)
    logits = 1.5 * torch.randn(len(TOKENS), VOCAB)
    metadata = spec_metadata([TOKENS[1:].tolist()] * count)
    sampler = tree_sampler(metadata, [TREE] * count)
    is_greedy = torch.arange(count) % 2 == 1
    bias = {4: 0.7, 2: -0.5}
    out = sampler(
        metadata,
        None,
        logits.repeat(count, 1),
        sampling_metadata(
            count,
            all_random=False,
            bias=dict.fromkeys(range(0, count, 2), bias),
            min_p=[0.1, 0.0] * (count // 2),
            temperature=torch.where(is_greedy, 0.0, 0.8),
            top_k=torch.where(is_greedy, VOCAB, 8).int(),
            top_p=torch.where(is_greedy, 1.0, 0.95),
        ),
    ).sampled_token_ids
    assert out.shape == (count, len(TOKENS)) and out.dtype == torch.int32

    greedy = out[is_greedy]
    assert (greedy == greedy[0]).all() and greedy[0, 0] == logits[0].argmax()
    sampled = out[~is_greedy]
    on_node = {0: torch.ones(len(sampled), dtype=torch.bool)}
    for node, parent in list(enumerate(PARENTS.tolist()))[1:]:
        depth = sampler.store.depths[0, node]
        on_node[node] = on_node[parent] & (sampled[:, depth - 1] == TOKENS[node])
    counts, laws = [], []
    for node, reached in on_node.items():
        laws.append(warped(logits[node], bias, 0.8, 0.1, 8, 0.95).double())
        depth = int(sampler.store.depths[0, node])
        counts.append(torch.bincount(sampled[reached, depth].long(), minlength=VOCAB))
        assert (counts[-1][laws[-1] == 0] == 0).all()
    found = chi_square(torch.stack(counts), torch.stack(laws))
    assert found.p > 1e-4 and found.cells > 10
    # After the first token that is no child there is nothing more.
    is_leaf_or_off = torch.stack([on_node[n] for n in (1, 2)]).any(0)
    assert (sampled[~is_leaf_or_off, 1:] == -1).all()


def test_seeded_request_does_not_depend_on_its_neighbours():
    torch.manual_seed(4)
    logits = torch.randn(len(TOKENS), VOCAB)
    drafts = TOKENS[1:].tolist()

    def tokens(before: int) -> list[int]:
        metadata = spec_metadata([drafts] * (before + 1))
        sampler = tree_sampler(metadata, [TREE] * (before + 1))
        settings = sampling_metadata(
            before + 1, generators={before: torch.Generator().manual_seed(5)}
        )
        out = sampler(metadata, None, logits.repeat(before + 1, 1), settings)
        return out.sampled_token_ids[before].tolist()

    assert tokens(0) == tokens(0) == tokens(3)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_logprobs_follow_the_path(mode):
    """Greedy draws that walk to the second child and on: logits of nodes 0, 2 and 5."""
    torch.manual_seed(5)
    logits = torch.randn(len(TOKENS), VOCAB)
    logits[0, 7] = logits[2, 2] = logits[5, 11] = 9.0
    metadata = spec_metadata([[], TOKENS[1:].tolist()])
    sampler = tree_sampler(metadata, [None, TREE], mode)
    settings = sampling_metadata(
        2, all_greedy=True, all_random=False, temperature=None, max_num_logprobs=2,
        bias={1: {3: 1.0}},
    )  # fmt: skip
    out = sampler(metadata, None, torch.cat([logits[:1], logits]), settings)
    assert out.sampled_token_ids.tolist() == [[7] + [-1] * 6, [7, 2, 11] + [-1] * 4]
    if mode == "processed_logprobs":
        logits = logits + torch.nn.functional.one_hot(torch.tensor(3), VOCAB)
    expected = logits[[0, 2, 5]].log_softmax(-1)
    best = expected.topk(2)
    rows = slice(7, 10)
    assert out.logprobs_tensors.logprob_token_ids[rows, 1:].equal(best.indices.int())
    torch.testing.assert_close(out.logprobs_tensors.logprobs[rows, 1:], best.values)
    torch.testing.assert_close(out.logprobs_tensors.logprobs[rows, 0], best.values[:, 0])


# Refused ----------------------------------------------------------------------------------------


def test_draft_probabilities_are_refused():
    metadata = spec_metadata([TOKENS[1:].tolist()])
    sampler = tree_sampler(metadata, [TREE])
    with pytest.raises(ValueError, match="without draft probabilities"):
        sampler(metadata, torch.ones(6, VOCAB), torch.zeros(7, VOCAB), sampling_metadata(1))


def test_trees_on_another_device_need_the_other_runner(monkeypatch):
    from vllm.platforms import current_platform

    from vllm_msd.vllm_plugin import runners

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER"), runners._tree_runner():
        pass


@pytest.mark.parametrize("source", ["TreeModelRunner", "TreeProposer", "TreeRejectionSampler"])
def test_overrides_fit_vllm(source, monkeypatch):
    """They are checked when a worker starts; a method that vLLM has renamed is refused."""
    from vllm_msd.vllm_plugin.cpu import runner
    from vllm_msd.vllm_plugin.patches.overrides import check_overrides
    from vllm_msd.vllm_plugin.patches.patching import PatchError

    cls = getattr(runner, source)
    check_overrides(cls)
    name = next(n for n, method in vars(cls).items() if getattr(method, "__override__", False))
    monkeypatch.setattr(cls, name + "_as_it_was_called", getattr(cls, name), raising=False)
    with pytest.raises(PatchError, match="is missing"):
        check_overrides(cls)
