"""Prefill, tree growing and continuations against the recorded reference.

Floats of a prefill agree to 2e-5 (float32, other order of summation). A tree's levels feed on each
other's output, which carries the difference on: 1e-4 there, of which processors with other matrix
kernels have been seen to use 4e-5. The recorded draws keep every top-k gap far above that, so
integers must be equal.
"""

import torch
from torch.testing import assert_close

from tests.common.tree_tensors import retrieve_indices, tree_mask
from vllm_msd.draft import DraftCache
from vllm_msd.tree import DraftTree, draft_tree

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
STEP_TOLERANCE = {"atol": 1e-4, "rtol": 2e-5}


def test_draft_holds_the_published_weights(ref):
    state = ref.draft.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == ref.info["draft_state_dict_keys"]


def test_regenerated_matrices_agree_with_the_stored_rows(ref):
    """The SHA-256 is checked on generation; the rows in use are stored as well."""
    if "used_ids" not in ref.info["tensors"]:
        return
    ids = ref["used_ids"]
    assert torch.equal(ref.embedding[ids], ref["used_embed_rows"])
    assert torch.equal(ref.lm_head[ids], ref["used_lm_head_rows"])


def test_prefill_trees_and_continuations(ref, prompt, tree):
    case, shape, cache = f"{prompt}.{tree}", ref.shape(tree), DraftCache()
    assert ref.num_calls(case) > 0
    previous_ids = ref[f"{prompt}.prompt.input_ids"].shape[1]
    for number in range(ref.num_calls(case)):
        call = f"{case}.call{number}"
        new_ids = ref[f"{call}.input_ids"][:, previous_ids:]
        if number == 0:
            root = new_ids[:, 0]
            rows = ref.prompt_rows(prompt, root)
            out = ref.draft(*rows, cache=cache)
        else:
            assert cache.num_columns == int(ref[f"{call}.stable_len_before"])
            tokens, root = new_ids, new_ids[:, -1]
            # The accepted tokens without the old root, then the new one.
            positions = cache.num_columns + torch.arange(tokens.shape[1])[None]
            out = ref.draft(
                ref.embed(tokens),
                ref[f"{call}.accept_hidden_states"],
                torch.zeros_like(tokens, dtype=torch.bool),
                positions,
                cache=cache,
            )
            assert cache.num_columns == int(ref[f"{call}.stable_len_after"])
        assert_close(out, ref[f"{call}.prefill_out"], **TOLERANCE)
        if f"{call}.stable_key" in ref.info["tensors"]:
            assert_close(cache.keys[0], ref[f"{call}.stable_key"], **TOLERANCE)
            assert_close(cache.values[0], ref[f"{call}.stable_value"], **TOLERANCE)

        grown = grow_and_check_steps(ref, call, cache, out[:, -1], root, shape)
        check_tree(ref, call, grown)
        previous_ids = ref[f"{call}.input_ids"].shape[1]


def grow_and_check_steps(ref, call, cache, last_hidden, root, shape):
    """Grow a tree while recording what the draft and the embedding table are fed."""
    fed_tokens, calls = [], []

    def embed(tokens):
        fed_tokens.append(tokens)
        return ref.embed(tokens)

    def record(module, args, output):
        calls.append((args, output))

    hook = ref.draft.register_forward_hook(record)
    try:
        grown = draft_tree(ref.draft, cache, last_hidden, root, embed, ref.head, shape)
    finally:
        hook.remove()

    stable = cache.num_columns
    assert len(calls) == ref.num_steps(call) == shape.depth
    for i, ((_, _, visual_mask, position_ids, attention_mask, _), out) in enumerate(calls):
        step = f"{call}.step{i}"
        assert torch.equal(fed_tokens[i], ref[f"{step}.input_ids"])
        assert torch.equal(position_ids[0], ref[f"{step}.position_ids"].flatten())
        assert not visual_mask.any()
        assert attention_mask[..., :stable].all()
        visible = attention_mask[..., stable:].to(torch.uint8)
        assert torch.equal(visible[:, None], ref[f"{step}.tree_mask"])
        assert_close(out, ref[f"{step}.out"], **STEP_TOLERANCE)
    return grown


def in_reference_order(ref, call, grown):
    """The same nodes in the order of the reference, which keeps them as they were proposed.

    Ours stand in order of probability. A node is known by the tokens on its path, siblings having
    distinct ones, so each of the reference's nodes must be found among ours exactly once.
    """
    reference = paths(ref[f"{call}.draft_tokens"][0], ref[f"{call}.tree_mask"][0, 0])
    ours = paths(grown.tokens[0], tree_mask(grown)[0])
    assert sorted(ours) == sorted(reference) and len(set(ours)) == len(ours)
    order = torch.tensor([ours.index(path) for path in reference])
    place = order.argsort()
    parents = grown.parents[0, order]
    parents = torch.where(parents < 0, -1, place[parents.clamp(min=0)])
    return DraftTree.from_parents(grown.tokens[:, order], parents[None])


def paths(tokens, mask):
    """The tokens from the root to each node; ancestors stand before their descendants."""
    return [tuple(tokens[row.bool()].tolist()) for row in mask]


def check_tree(ref, call, grown):
    grown = in_reference_order(ref, call, grown)
    assert torch.equal(grown.tokens, ref[f"{call}.draft_tokens"])
    assert torch.equal(grown.depths[0], ref[f"{call}.tree_position_ids"])
    assert torch.equal(tree_mask(grown)[:, None].to(torch.uint8), ref[f"{call}.tree_mask"])
    parents = grown.parents[0]
    assert torch.equal(retrieve_indices(parents), ref[f"{call}.retrieve_indices_greedy"])
    by_node = retrieve_indices(parents, lexicographic=True)
    assert torch.equal(by_node, ref[f"{call}.retrieve_indices_sampling"])
