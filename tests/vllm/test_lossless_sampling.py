"""Sampling under MSD follows the target's law: chi-square tests on a vocabulary of 24 tokens.

20,480 sequences of four tokens are drawn at temperature 1 and as many at temperature 0.7 with top-p
0.9, from a text-only prompt and one with an image in the same batches. Each of the four positions
is tested given those before it. ``FALSE_ALARM`` is the chance of each test to fail by accident;
the 16 tests together fail one time in 60,000 for a new seed, and never for the same one.
"""

import pytest
import torch

from tests.common import small_vocabulary
from tests.common.distribution import SequenceLaw, check_sequences, warp
from tests.common.worker import run_worker

FALSE_ALARM = 1e-6
DRAWS, CONTROL_DRAWS, SEED = 20_480, 2_400, 20


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    target, draft = small_vocabulary.build(tmp_path_factory.mktemp("small_vocabulary"))
    return run_worker(
        "sampling",
        "v1",
        target=target,
        draft=draft,
        draws=DRAWS,
        control_draws=CONTROL_DRAWS,
        seed=SEED,
    )


def trials(report: dict, wrong_rule: str) -> list[dict]:
    return [trial for trial in report["trials"] if trial["wrong_rule"] == wrong_rule]


@pytest.mark.long
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_draws_follow_the_targets_law(report, temperature, top_p):
    here = [t for t in trials(report, "none") if t["temperature"] == temperature]
    assert [t["prompt"] for t in here] == ["text", "image"]
    assert sum(t["draws"] for t in here) >= 20_000
    for trial in here:
        assert trial["top_p"] == top_p
        assert trial["batch"]["accepted"] > 1000
        assert trial["batch"]["rejected"] > 1000
        assert len(trial["positions"]) == 4
        for position, result in enumerate(trial["positions"]):
            where = f"{trial['prompt']} prompt, token {position}: {result}"
            assert result["cells"] > 0, where
            assert result["p"] > FALSE_ALARM, where


@pytest.mark.long
@pytest.mark.parametrize("rule", ["accept_every_draft", "redraw_without_residual", "redraw_best"])
def test_wrong_acceptance_rules_are_caught(report, rule):
    """On both prompts, at the first token that speculation has a hand in."""
    broken = trials(report, rule)
    assert [t["prompt"] for t in broken] == ["text", "image"]
    for trial in broken:
        assert trial["positions"][0]["p"] > FALSE_ALARM  # the prefill's token: no draft yet
        assert trial["positions"][1]["p"] < 1e-12, trial


def test_the_chi_square_itself():
    """Passes draws from the law; fails when one of ten best tokens is another, or one cannot be."""
    law = warp(torch.linspace(-2.0, 2.0, 24)[None], temperature=0.7, top_p=0.95)
    table = SequenceLaw([()], law[:, None])
    generator = torch.Generator().manual_seed(0)

    def p_of(tokens: torch.Tensor) -> float:
        return check_sequences([(token,) for token in tokens.tolist()], table)[0].p

    draws = torch.multinomial(law[0], 24_000, replacement=True, generator=generator)
    assert p_of(draws) > 1e-3
    likeliest = int(law.argmax())
    some = torch.rand(len(draws), generator=generator) < 0.1
    assert p_of(torch.where(some & (draws == likeliest), likeliest - 1, draws)) < 1e-9
    cut = int((law[0] == 0).nonzero()[0])
    assert p_of(torch.cat([draws, torch.tensor([cut])])) == 0.0


def test_top_p_keeps_the_smallest_sufficient_set():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert torch.allclose(
        warp(probs.log(), 1.0, 0.8), torch.tensor([0.625, 0.375, 0.0, 0.0], dtype=torch.float64)
    )
    assert (warp(probs.log(), 1.0, 0.81) > 0).tolist() == [True, True, True, False]


def test_min_p_then_top_k_then_top_p():
    """Each looks at what the one before it left."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

    def kept(**setting):
        return int((warp(logits, 1.0, **setting) > 0).sum())

    assert kept(min_p=0.45) == 3
    assert kept(min_p=0.55) == 2
    assert kept(top_k=2) == 2
    assert kept(top_p=0.43) == 2
    assert kept(top_p=0.43, min_p=0.45) == 1  # 0.4 of 0.9 left
    assert kept(top_p=0.43, top_k=3) == 1
    assert kept(top_k=3, min_p=0.55) == 2
    law = warp(logits, 0.5, top_k=3)
    assert torch.allclose(law, torch.tensor([16.0, 9.0, 4.0, 0.0], dtype=torch.float64) / 29)
