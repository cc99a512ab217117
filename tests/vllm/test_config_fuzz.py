"""Whatever is in a speculative config, it is served or refused with a sentence (`hypothesis`).

No engine is started. The long form is ``tests/long/test_serving.py``.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, seed, settings
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import EngineArgs

from tests.common import tiny
from tests.common.config_fuzz import configs, outcome
from vllm_msd.vllm_plugin import plugin


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """A tiny pair, its engine's arguments and vLLM's configs of the target."""
    plugin.register()
    pair = tiny.build_pair(tmp_path_factory.mktemp("pair"), "llava")
    arguments = EngineArgs(model=pair.target, max_model_len=512)
    return pair, arguments, arguments.create_model_config(), ParallelConfig()


def test_odd_configs(engine, monkeypatch):
    outcomes = try_configs(engine, monkeypatch, examples=60)
    assert outcomes["served"] > 2 and outcomes["refused"] > 10


def try_configs(engine, monkeypatch, examples: int, number: int = 0) -> Counter:
    """Try that many configs; `tests/long` does so too."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pair, arguments, target, parallel = engine
    outcomes: Counter = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(configs(pair.draft))
    def one(config):
        outcomes[
            outcome(EngineArgs.create_speculative_config, arguments, config, target, parallel)
        ] += 1

    one()
    return outcomes
