"""Drafts of single requests under Model Runner V2: what the scheduler is left with."""

from types import SimpleNamespace

import pytest

from vllm_msd.vllm_plugin import request_drafts

PLACEHOLDERS = [-1] * 5


def request(drafts=PLACEHOLDERS, **own):
    return SimpleNamespace(
        spec_token_ids=drafts, sampling_params=SimpleNamespace(extra_args=own or None)
    )


class Scheduler:
    """What vLLM's does with drafts: schedules those of every running request."""

    def __init__(self, requests, v2=True):
        self.requests, self.use_v2_model_runner, self.vllm_config = requests, v2, None
        self.running = list(requests.values())

    @request_drafts.wrap_schedule
    def schedule(self, throttle_prefills=False):
        return SimpleNamespace(
            num_scheduled_tokens={
                name: 1 + len(r.spec_token_ids) for name, r in self.requests.items()
            },
            num_spec_tokens_to_schedule=5,
        )


@pytest.fixture
def msd_engine(monkeypatch):
    monkeypatch.setattr(request_drafts, "is_msd", lambda config: True)


def test_each_request_keeps_what_it_wants(msd_engine):
    found = Scheduler(
        {
            "all": request(),
            "none": request(msd=False),
            "two": request(msd_max_nodes=2),
            "more": request(msd_max_nodes=9),
            "cut already": request([7, 8], msd_max_nodes=3),
            "none yet": request([], msd_max_nodes=3),
        }
    ).schedule()
    assert found.num_scheduled_tokens == {
        "all": 6, "none": 1, "two": 3, "more": 6, "cut already": 3, "none yet": 1,
    }  # fmt: skip
    assert found.num_spec_tokens_to_schedule == 5
    assert PLACEHOLDERS == [-1] * 5, "the list that all requests share"


def test_nothing_is_drafted_where_nobody_wants_it(msd_engine):
    nobody = Scheduler({"a": request(msd=False), "b": request(msd_max_nodes=0)})
    assert nobody.schedule().num_spec_tokens_to_schedule == 0
    idle = Scheduler({})
    assert idle.schedule().num_spec_tokens_to_schedule == 5


@pytest.mark.parametrize("is_msd", [False, True])
def test_other_engines_are_left_alone(monkeypatch, is_msd):
    """Those without MSD, and Model Runner V1, whose drafters cut by themselves."""
    monkeypatch.setattr(request_drafts, "is_msd", lambda config: is_msd)
    found = Scheduler({"none": request(msd=False)}, v2=not is_msd).schedule()
    assert found.num_scheduled_tokens == {"none": 6}
    assert found.num_spec_tokens_to_schedule == 5
