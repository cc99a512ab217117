"""Sampling through draft trees follows the target's law; wrong acceptance rules are caught.

As `test_lossless_sampling`, with trees of eight nodes, three wide and two deep: 4,096 sequences of
four tokens at temperature 1, and as many with everything that cuts the law at once.
"""

import pytest

from tests.common import small_vocabulary
from tests.common.worker import run_worker
from tests.common.wrong_rules import WRONG_TREE_RULES

pytestmark = pytest.mark.long
FALSE_ALARM = 1e-6
DRAWS, CONTROL_DRAWS, SEED = 4_096, 8_192, 21
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 6, "min_p": 0.02},
]


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
        spec_tokens=8,
        tree=(2, 3),
        settings=SETTINGS,
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_follow_the_targets_law(report, setting):
    trials = [t for t in report["trials"] if setting.items() <= t.items()]
    trials = [t for t in trials if t["wrong_rule"] == "none"]
    assert [t["prompt"] for t in trials] == ["text", "image"]
    for trial in trials:
        assert trial["draws"] == DRAWS // 2
        assert trial["batch"]["accepted"] > 1000
        assert trial["batch"]["rejected"] > 1000
        for position, result in enumerate(trial["positions"]):
            where = f"{trial['prompt']} prompt, token {position}: {result}"
            assert result["cells"] > 0 or position == 0, where  # the cut may leave one first token
            assert result["p"] > FALSE_ALARM, where


@pytest.mark.parametrize("rule", [rule.__name__ for rule in WRONG_TREE_RULES["v1"]])
def test_wrong_acceptance_rules_are_caught(report, rule):
    broken = [t for t in report["trials"] if t["wrong_rule"] == rule]
    assert [t["prompt"] for t in broken] == ["text", "image"]
    for trial in broken:
        assert trial["positions"][0]["p"] > FALSE_ALARM  # the prefill's token: no draft yet
        assert min(position["p"] for position in trial["positions"][1:]) < 1e-12, trial
