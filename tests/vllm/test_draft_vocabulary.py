"""A draft with a vocabulary of its own changes no token, and proposes no other tokens.

Each report comes from one process: the same cases without speculation, with the draft as it is
(``whole``), with a vocabulary of all tokens (``all``), and with one of half the tokens that the
target says (``half``).
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.common import small_vocabulary, tiny
from tests.common.long import long_but
from tests.common.tiny_targets import VOCAB, printable_ids
from tests.common.vocabularies import trimmed
from tests.common.worker import run_worker
from vllm_msd.errors import CheckpointError, ConfigError

HALF = sorted(printable_ids())[::2]
CASES = {
    "v1": ["mixed_batch", "constrained_beside_free"],
    "v2": ["mixed_batch", "structured_output"],
}
WAYS = {
    "chain": {"spec_tokens": 4},
    "tree": {"spec_tokens": 12, "tree": (4, 3)},
    # Greedy requests take the most likely token here as well.
    "drawn": {"spec_tokens": 4, "draft_sample_method": "probabilistic"},
}
RUNS = [("v1", "chain"), ("v1", "tree"), ("v1", "drawn"), ("v2", "chain"), ("v2", "tree")]
FALSE_ALARM = 1e-6  # the chance of each test of a law to fail by accident
SHORT = {run for run in RUNS if run[0] == "v1"}


@pytest.fixture(scope="module")
def drafts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    pair = tiny.build_pair(folder / "pair", "llava", decoys=2)
    # Beside the target, which the config names.
    named = {
        "all": trimmed(pair.draft, folder / "pair" / "all", list(range(VOCAB))),
        "half": trimmed(pair.draft, folder / "pair" / "half", HALF),
    }
    return pair.target, {"whole": pair.draft, **named}


@pytest.fixture(scope="module")
def reports(drafts):
    target, folders = drafts

    @cache
    def report(runner):
        ways = {way: WAYS[way] for r, way in RUNS if r == runner}
        return run_worker(
            "vocabulary", runner, kind="llava", target=target, drafts=folders, cases=CASES[runner],
            ways=ways,
        )  # fmt: skip

    return report


@pytest.mark.parametrize(("runner", "way"), long_but(SHORT, RUNS))
def test_same_tokens_within_the_vocabulary(reports, runner, way):
    report = reports(runner)[way]
    for draft, found in report.items():
        for name, case in found["cases"].items():
            assert case["same"], f"{draft}, {name}: {case['first_difference']}"
            assert case["accepted"] > 0
            assert case["rejected"] > 0
    assert set(report["half"]["proposed"]) <= set(HALF)
    assert not set(report["whole"]["proposed"]) <= set(HALF)
    assert report["half"]["accepted"] < report["whole"]["accepted"]


@pytest.mark.parametrize(("runner", "way"), long_but(SHORT, RUNS))
def test_a_vocabulary_of_all_tokens_is_none(reports, runner, way):
    """Same drafts and same counts in every case."""
    report = reports(runner)[way]
    assert report["all"] == report["whole"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("offsets", "settings", "message"),
    [
        ([0, 0, 400], {}, "got the token id 402, expected 0 to 319"),
        ([5, 4, 0], {}, "got the token id 5 more than once"),
        ([0, 0, 0], {"num_speculative_tokens": 9, "tree_depth": 2, "tree_top_k": 4},
         "tree_top_k: got 4, expected at most 3"),
    ],
)  # fmt: skip
def test_refused_before_the_engine_starts(drafts, tmp_path, offsets, settings, message):
    from vllm.engine.arg_utils import EngineArgs

    target, folders = drafts
    folder = Path(trimmed(folders["whole"], tmp_path / "draft", [0, 1, 2]))
    state = load_file(folder / "model.safetensors")
    save_file({**state, "d2t": torch.tensor(offsets)}, folder / "model.safetensors")
    arguments = EngineArgs(
        model=target,
        max_model_len=512,
        speculative_config={"method": "msd", "model": str(folder), **settings},
    )
    with pytest.raises(ValueError, match=message):
        arguments.create_engine_config()


@pytest.fixture
def model():
    """A draft's logits and nothing else of it: 4 of 9 tokens, hidden states are columns."""
    from vllm_msd.vllm_plugin.draft_model import EagleMsdForCausalLM

    model = EagleMsdForCausalLM.__new__(EagleMsdForCausalLM)
    torch.nn.Module.__init__(model)
    model.vocab_size, model.num_columns = 9, 4
    model.register_buffer("token_ids", torch.tensor([1, 4, 5, 8]))
    model.lm_head = None
    model.logits_processor = lambda head, hidden, **_: hidden
    model.logits_processor.get_top_tokens = lambda head, hidden: hidden.argmax(-1)
    return model


def test_logits_outside_the_vocabulary_are_no_probability(model):
    columns = torch.tensor([[0.5, 3.0, -2.0, 1.0], [9.0, 0.0, 0.0, 8.0]])
    probs = model.compute_logits(columns).softmax(-1)
    assert torch.equal(probs[:, [1, 4, 5, 8]], columns.softmax(-1))
    assert not probs[:, [0, 2, 3, 6, 7]].any()
    assert model.get_top_tokens(columns).tolist() == [4, 1]


def test_chains_of_model_runner_v2_map_what_is_best(model, monkeypatch):
    from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator

    from vllm_msd.vllm_plugin.gpu.chain_speculator import ChainSpeculator

    monkeypatch.setattr(EagleSpeculator, "sample_draft", lambda *_, **__: "vLLM's own")
    columns = torch.tensor([[0.5, 3.0, -2.0, 1.0], [9.0, 0.0, 0.0, 8.0]])
    drafter = ChainSpeculator.__new__(ChainSpeculator)
    drafter.model, drafter.acceptance_estimator = model, None
    assert drafter.sample_draft(columns, *[None] * 6).tolist() == [4, 1]
    # Drawn drafts, and those whose probability is to be known, need logits of all tokens.
    assert drafter.sample_draft(columns, *[None] * 5, torch.zeros(1)) == "vLLM's own"
    drafter.acceptance_estimator = object()
    assert drafter.sample_draft(columns, *[None] * 6) == "vLLM's own"


def test_a_head_without_plain_rows_is_refused():
    from vllm_msd.vllm_plugin.own_head import own_head

    head = SimpleNamespace(org_vocab_size=320, quant_method=SimpleNamespace())
    with pytest.raises(CheckpointError, match="the target's head is quantized"):
        own_head(head, torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="got the token id 320"):
        own_head(head, torch.tensor([1, 320]))


@pytest.mark.long
def test_two_tensor_parallel_ranks(drafts):
    """Rows of the own head come from both ranks' parts of the target's."""
    target, folders = drafts
    arguments = {
        "kind": "llava",
        "target": target,
        "drafts": {"half": folders["half"]},
        "cases": ["mixed_batch"],
        "ways": {"chain": WAYS["chain"]},
    }
    one = run_worker("vocabulary", "v1", **arguments)["chain"]["half"]["cases"]
    two = run_worker("vocabulary", "v1", tensor_parallel_size=2, **arguments)["chain"]["half"]
    assert two["cases"] == one


@pytest.mark.long
@pytest.mark.parametrize(
    ("runner", "way", "draws"),
    [("v1", "drawn", 4_096), ("v1", "tree", 4_096), ("v2", "drawn", 512)],
)
def test_draws_follow_the_targets_law(tmp_path, runner, way, draws):
    """As `test_lossless_sampling`, with a draft that can propose half of 24 tokens.

    ``drawn`` proposals come from the draft's own law, which is 0 outside its vocabulary.
    """
    target, draft = small_vocabulary.build(tmp_path / "pair")
    folder = trimmed(draft, tmp_path / "pair" / "half", list(range(0, small_vocabulary.VOCAB, 2)))
    settings = {
        "tree": {"spec_tokens": 8, "tree": (2, 3)},
        "drawn": {"spec_tokens": 2, "draft_sample_method": "probabilistic"},
    }[way]
    report = run_worker(
        "sampling", runner, target=target, draft=folder, draws=draws, control_draws=0, seed=22,
        settings=[{"temperature": 1.0}], **settings,
    )  # fmt: skip
    assert [trial["prompt"] for trial in report["trials"]] == ["text", "image"]
    for trial in report["trials"]:
        assert trial["draws"] == draws // 2
        assert trial["batch"]["accepted"] > 100
        assert trial["batch"]["rejected"] > 100
        for position, result in enumerate(trial["positions"]):
            where = f"{trial['prompt']} prompt, token {position}: {result}"
            assert result["cells"] > 0, where
            assert result["p"] > FALSE_ALARM, where
