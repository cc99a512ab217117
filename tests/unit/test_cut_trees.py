"""A tree cut short accepts at least as much as any other cut of its size: on the demo pair.

The target says its greedy replies once. At every token of them the draft grows its whole tree, and
each cut of it is followed along the recorded reply; no engine runs.
"""

import random
from math import sqrt

import pytest
import torch

from demo_factory.write_data import write_data
from vllm_msd.checkpoint import load_draft
from vllm_msd.demo.paths import demo_pair
from vllm_msd.draft import DraftCache, DraftRows, MSDDraft
from vllm_msd.training.acceptance import greedy_replies
from vllm_msd.training.data.batches import collate
from vllm_msd.training.data.index import RecordFile, image_roots
from vllm_msd.training.rows import draft_rows
from vllm_msd.training.targets import Target
from vllm_msd.tree import TreeConfig, draft_tree

TREE = TreeConfig(24, 5, 6)
SIZES = (1, 2, 3, 5, 8, 12, 16)
RANDOM_CUTS = 8
RECORDS = 4  # of text, and as many with an image


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    """Of every token of the replies: the tree's tokens and parents, and what the target says."""
    pair = demo_pair()
    paths = write_data(tmp_path_factory.mktemp("world"), RECORDS, split="test").values()
    files = [RecordFile(path) for path in paths]
    target = Target.load(pair.target, "float32", device="cpu")
    config, state = load_draft(pair.draft)
    weights = {k: v.float() for k, v in state.items() if k != "embed_tokens.weight"}
    draft = MSDDraft.from_state_dict(config, weights).eval()
    records = [(file, number) for file in files for number in range(len(file))]
    renderer = target.renderer(image_roots([], files), 4096)
    replies, bad = greedy_replies(target, renderer, records, 48, TREE.depth)
    assert not bad
    found = []
    with torch.no_grad():
        for reply in replies:
            batch = collate([reply.talk], target.pad_id)
            rows = draft_rows(target.features(batch), target.embed, "decoupled")
            ids, cache, fed = batch.input_ids, DraftCache(), 0
            for newest in range(reply.start, reply.end):
                last = draft(*DraftRows(*(x[:, fed:newest] for x in rows)), cache)[:, -1]
                fed = newest
                tree = draft_tree(
                    draft, cache, last, ids[:, newest], target.embed,
                    lambda hidden: hidden @ target.head.T, TREE.shape,
                )  # fmt: skip
                said = ids[0, newest + 1 :].tolist()
                found.append((tree.tokens[0].tolist(), tree.parents[0].tolist(), said))
    return found


def accepted(tokens, parents, said, kept):
    """Tokens of what the target says that the kept nodes hold, from the root on."""
    node = count = 0
    for token in said:
        children = [n for n in kept if n and parents[n] == node and tokens[n] == token]
        if not children:
            break
        node, count = children[0], count + 1
    return count


def level_order(parents, size):
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return sorted(range(1, len(parents)), key=lambda n: (depths[n], n))[:size]


def connected_at_random(parents, size, rng):
    kept, open_nodes = [0], [n for n, parent in enumerate(parents) if parent == 0]
    for _ in range(size):
        node = open_nodes.pop(rng.randrange(len(open_nodes)))
        kept.append(node)
        open_nodes += [n for n, parent in enumerate(parents) if parent == node]
    return kept


def least_probable(parents, size):
    """Connected as well, but of the nodes that the tree holds last."""
    kept = [0]
    for _ in range(size):
        reachable = [n for n in range(1, len(parents)) if parents[n] in kept and n not in kept]
        kept.append(max(reachable))
    return kept


@pytest.fixture(scope="module")
def gains(drafted):
    """By size and other cut, at every token: how many more tokens the prefix accepts."""
    rng = random.Random(0)
    others = {
        "level order": level_order,
        "least probable": least_probable,
        **dict.fromkeys(
            (f"random {i}" for i in range(RANDOM_CUTS)),
            lambda parents, size: connected_at_random(parents, size, rng),
        ),
    }
    found = {}
    for size in SIZES:
        for tokens, parents, said in drafted:
            best = accepted(tokens, parents, said, range(1, size + 1))
            for name, cut in others.items():
                kept = cut(parents, size)
                found.setdefault((size, name), []).append(
                    best - accepted(tokens, parents, said, kept)
                )
    return found


def test_the_trees_are_worth_cutting(drafted):
    """Enough of them, and whole ones accept more than their first nodes do."""
    whole = sum(accepted(*tree, range(1, TREE.num_nodes + 1)) for tree in drafted)
    first = sum(accepted(*tree, [1]) for tree in drafted)
    assert len(drafted) > 100 and whole > 1.5 * first > 0


def test_no_other_cut_accepts_more(gains):
    """Within two standard errors of the paired difference, for every size and cut."""
    for (size, name), found in gains.items():
        noise = 2 * sqrt(sum(gain * gain for gain in found))
        assert sum(found) >= -noise, (size, name, sum(found), noise)


def test_the_comparison_tells_cuts_apart(gains):
    """Cuts that ignore the probabilities accept clearly less: by more than four standard errors."""
    for size in (3, 5, 8):
        for name in ("level order", "least probable", "random 0"):
            found = gains[size, name]
            noise = 4 * sqrt(sum(gain * gain for gain in found))
            assert sum(found) > noise, (size, name, sum(found), noise)
