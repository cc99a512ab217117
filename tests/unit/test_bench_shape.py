"""Random weights of a true shape, with acceptance from a table: the draws, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vllm_msd.bench import engines, true_shapes
from vllm_msd.bench.arms import parse_arms
from vllm_msd.bench.engines import models_of
from vllm_msd.bench.replay import FIRST_TOKEN, Replay, shape_of, synthetic_rates
from vllm_msd.bench.settings import SHAPED, BenchSettings
from vllm_msd.budget import PAPER_TREE, expected_tree, ratio_for, usual_tree
from vllm_msd.demo.paths import demo_pair
from vllm_msd.errors import ConfigError
from vllm_msd.tree import TreeConfig, TreeStore

RATIO = ratio_for(4.75)
SHAPES = [PAPER_TREE, TreeConfig(16, 6, 3), TreeConfig(5, 5, 1), TreeConfig(1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_usual_tree_is_a_tree(shape):
    tree = usual_tree(shape, [RATIO])
    chances, depths = (
        torch.tensor([x, *y.tolist()]) for x, y in ((1.0, tree.chances), (0, tree.depths))
    )
    numbers = torch.arange(1, shape.num_nodes + 1)
    parents = torch.tensor(tree.parents)
    assert (parents < numbers).all()
    assert (depths[1:] == depths[parents] + 1).all()
    assert (chances[1:] <= chances[parents]).all()
    assert max(torch.bincount(parents)) <= shape.top_k


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_accept_what_the_table_says(shape):
    """Trees of several requests, walked by what accepts real ones."""
    replay, requests, steps = Replay(shape, RATIO, seed=3), 3, 200
    nodes = shape.num_nodes + 1
    store = TreeStore(requests, requests * nodes, nodes)
    store.put(slice(0, requests), replay.tree)
    row_start = torch.arange(0, (requests + 1) * nodes, nodes)
    tokens = replay.tree.tokens[0].repeat(requests)
    counts = []
    for _ in range(steps):
        drawn = replay.drawn(row_start, len(tokens))
        counts += store.accept(slice(0, requests), row_start, drawn, tokens).lengths.tolist()
    wanted = expected_tree(shape, [RATIO])[0].sum()
    assert sum(counts) / len(counts) == pytest.approx(wanted, abs=0.02)
    assert {*counts} == {*range(shape.depth + 1)}, "all depths come"


def test_a_tree_that_was_cut_accepts_what_is_there():
    replay = Replay(TreeConfig(16, 6, 3), RATIO, seed=0)
    store = TreeStore(2, 9, 17)
    store.put(slice(0, 2), replay.tree)
    row_start = torch.tensor([0, 1, 4])  # a root alone, and one with two nodes
    tokens = torch.tensor([-1, -1, *replay.tree.tokens[0, 1:3]])
    for _ in range(50):
        drawn = replay.drawn(row_start, 4)
        lengths = store.accept(slice(0, 2), row_start, drawn, tokens).lengths
        assert lengths[0] == 0 and lengths[1] <= 2


def test_a_chain_is_forced_through_its_logits():
    replay, accepted = Replay(TreeConfig(3, 3, 1), RATIO, seed=1), 0
    metadata = SimpleNamespace(
        num_draft_tokens=[3, 0, 2],
        target_logits_indices=torch.tensor([0, 1, 2, 5, 6]),
        draft_token_ids=torch.tensor([7, 8, 9, 7, 8]),
    )
    for _ in range(300):
        logits = torch.randn(8, 16)
        logits[[3, 4, 7]] = 0.0
        replay.force(logits, metadata)
        said = logits.argmax(1)[metadata.target_logits_indices] == metadata.draft_token_ids
        for own in (said[:3].tolist(), said[3:].tolist()):
            assert own == sorted(own, reverse=True), "what follows a rejected token is rejected"
        accepted += int(said[:3].sum())
        assert not logits[[3, 4, 7]].any()
    assert accepted / 300 == pytest.approx(sum(RATIO**d for d in (1, 2, 3)), abs=0.05)


def test_the_same_seed_draws_the_same():
    first, again, other = (Replay(PAPER_TREE, RATIO, seed) for seed in (1, 1, 2))
    ends = first.ends(40)
    assert torch.equal(ends, again.ends(40)) and not torch.equal(ends, other.ends(40))
    assert not torch.equal(ends, first.ends(40)), "they go on"


def test_vllm_replays_chains_by_rates():
    arm = parse_arms(["chain:3"])[1]
    rates = synthetic_rates(arm, 0.5)["synthetic_acceptance_rates"]
    assert rates == [0.5, 0.25, 0.125] and shape_of(arm) == TreeConfig(3, 3, 1)
    assert FIRST_TOKEN > 10, "no special token is drafted"


def test_weights_are_those_of_the_published_models():
    """LLaVA-1.5-7B has 7.06 billion parameters, Qwen2-VL-7B 8.29; beside them a draft's layer."""
    for name, billions in (("llava-1.5-7b", 7.06 + 0.236), ("qwen2-vl-7b", 8.29 + 0.259)):
        assert true_shapes.weight_bytes(name, "bfloat16") / 2e9 == pytest.approx(billions, abs=0.02)


@pytest.mark.parametrize("name", ["tiny", "qwen2-vl-7b"])
def test_a_prompts_picture_is_found_by_the_processor(name, tmp_path):
    """What the tokenizer writes for a picture is what processor and config call one."""
    from transformers import AutoConfig, AutoProcessor

    true_shapes.write_target(name, demo_pair().target, tmp_path / "target", "float32")
    processor = AutoProcessor.from_pretrained(tmp_path / "target")
    config = AutoConfig.from_pretrained(tmp_path / "target")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    size = (112, 140)
    found = processor(images=[Image.new("RGB", size)], text=[text])["input_ids"][0]
    token = config.image_token_id
    assert token == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    # LLaVA crops to 8 x 8 patches; Qwen2-VL takes squares of 28 pixels as they come.
    assert found.count(token) == (64 if name == "tiny" else 4 * 5)


def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_memory", lambda: 24 << 30)
    monkeypatch.setenv("MSD_CACHE_DIR", str(tmp_path / "cache"))
    settings = BenchSettings(tmp_path, shape="llava-1.5-13b", dtype="bfloat16", **SHAPED)
    with pytest.raises(ConfigError, match=r"needs 3\d\.\d GiB.*this machine has 24\.0"):
        models_of(settings)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"shape": "gpt"}, "expected one of llava-1.5-7b"),
        ({"shape": "tiny", "arms": ("chain", "auto")}, "random weights say nothing"),
        ({"shape": "tiny", "engines": "together"}, "expected apart"),
        ({"shape": "tiny", "target": "org/model"}, "no --target"),
        ({"shape": "tiny", "accepted": 8.0}, "more than 1 and less than 7"),
        ({"shape": None, "accepted": 3.0}, "only a --shape"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        BenchSettings(tmp_path, **{**SHAPED, **wrong}).check()
    BenchSettings(tmp_path, shape="tiny", **SHAPED).check()
