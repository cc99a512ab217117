"""Sizes left to the plugin: what it may choose from, and where it takes the draft's instead."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from tests.common.configuring import configure, msd, tree
from vllm_msd.errors import ConfigError
from vllm_msd.tree import TreeConfig
from vllm_msd.vllm_plugin.configuration import auto_sizes, request_options, resolve
from vllm_msd.vllm_plugin.configuration.auto_sizes import CHAIN, TREE
from vllm_msd.vllm_plugin.configuration.tree_settings import (
    auto_shapes,
    drafts_trees,
    scheduled_sizes,
)

pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def fallbacks(monkeypatch):
    """What the plugin logs when it cannot choose."""
    found = []
    monkeypatch.setattr(
        logging.getLogger("vllm.vllm_msd"),
        "info",
        lambda text, *args: found.append(text % args),
    )
    return found


def shapes_of(spec):
    return auto_shapes(SimpleNamespace(speculative_config=spec))


@pytest.mark.parametrize("keys", [{}, {"num_speculative_tokens": "auto"}], ids=str)
def test_without_sizes_a_chain_or_a_tree_may_be_drafted(pair, keys):
    spec = configure(pair.target, msd(pair, **keys))
    assert spec.num_speculative_tokens == TREE.num_nodes and drafts_trees(spec)
    assert shapes_of(spec) == [TREE, CHAIN]


def test_given_sizes_stay_as_they_are(pair):
    spec = configure(pair.target, msd(pair, num_speculative_tokens=3))
    assert (spec.num_speculative_tokens, shapes_of(spec), drafts_trees(spec)) == (3, [], False)
    spec = configure(pair.target, msd(pair, **tree(12, 4, 3)))
    assert (spec.num_speculative_tokens, shapes_of(spec)) == (12, [])
    spec = configure(pair.target, msd(pair, tree_top_k=1))
    assert (spec.num_speculative_tokens, shapes_of(spec)) == (5, [])


def test_a_drafts_own_tree_is_one_to_choose_from(pair, tmp_path):
    config = json.loads((Path(pair.draft) / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(Path(pair.draft) / "model.safetensors")

    def spec(**changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return configure(pair.target, {"method": "msd", "model": str(tmp_path)})

    own = spec(**tree(24, 6, 4))
    assert [shape.num_nodes for shape in shapes_of(own)] == [24, 8]
    profile = {"by_depth": [0.9, 0.8], "by_probability": [[0.1, 0.05], [0.9, 0.8]]}
    hf_config = spec(msd_acceptance=profile).draft_model_config.hf_config
    assert hf_config.msd_draft["msd_acceptance"] == profile


@pytest.mark.parametrize(
    ("keys", "engine", "reason"),
    [
        ({"draft_sample_method": "probabilistic"}, {}, "draft_sample_method"),
        ({}, {"logits_processors": ["tests.x:Y"]}, "logits_processors does not work"),
        ({}, {"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({}, {"max_num_batched_tokens": 8, "max_num_seqs": 2}, "max_num_batched_tokens=8"),
    ],
    ids=str,
)
def test_where_sizes_have_to_be_fixed_they_are_the_drafts(pair, fallbacks, keys, engine, reason):
    spec = configure(pair.target, msd(pair, **keys), **engine)
    assert (spec.num_speculative_tokens, shapes_of(spec)) == (5, [])
    assert len(fallbacks) == 1 and reason in fallbacks[0]


# Model Runner V2: the draft's own shape, and which of its nodes by a schedule ---------------------


def sizes_of(spec):
    return scheduled_sizes(SimpleNamespace(speculative_config=spec))


@pytest.fixture
def second_runner(monkeypatch):
    monkeypatch.setattr(auto_sizes, "runs_v2", lambda: True)


@pytest.mark.parametrize("keys", [{}, {"num_speculative_tokens": "auto"}], ids=str)
def test_under_model_runner_v2_a_schedule_names_the_sizes(pair, second_runner, keys):
    spec = configure(pair.target, msd(pair, **keys))
    assert (spec.num_speculative_tokens, sizes_of(spec)) == (5, [0, 1, 2, 3, 5])
    assert shapes_of(spec) == [TreeConfig(5, 5, 1)] and not drafts_trees(spec)
    schedule = spec.num_speculative_tokens_per_batch_size
    assert sorted(nodes for *_, nodes in schedule) == sizes_of(spec)
    few = configure(pair.target, msd(pair, **keys), max_num_seqs=3)
    assert sizes_of(few) == [0, 1, 5]


def test_under_model_runner_v2_a_draft_that_prefers_trees_gets_them(pair, second_runner, tmp_path):
    config = json.loads((Path(pair.draft) / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(Path(pair.draft) / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, **tree(24, 6, 4)}))
    spec = configure(pair.target, {"method": "msd", "model": str(tmp_path)})
    assert (sizes_of(spec), drafts_trees(spec)) == ([0, 1, 2, 5, 11, 24], True)


@pytest.mark.parametrize(
    ("keys", "engine", "reason"),
    [
        ({"num_speculative_tokens_per_batch_size": [[1, 4, 5], [5, 9, 0]]}, {}, "_per_batch_size"),
        ({"enable_adaptive_verification": True}, {}, "enable_adaptive_verification says"),
        ({}, {"data_parallel_size": 2}, "data_parallel_size=2"),
        ({}, {"distributed_executor_backend": "external_launcher"}, "external_launcher"),
        ({}, {"max_num_seqs": 1}, "max_num_seqs=1"),
    ],
    ids=str,
)
def test_where_the_scheduler_cannot_choose(pair, second_runner, fallbacks, keys, engine, reason):
    args = SimpleNamespace(**{"max_num_seqs": None, **engine})
    parallel = SimpleNamespace(
        **{"data_parallel_size": 1, "distributed_executor_backend": "mp", **engine}
    )
    draft = resolve.read_draft(pair.draft, None, None)
    with pytest.raises(ConfigError, match=reason):
        auto_sizes.auto_shapes(args, keys, draft, None, parallel)


def test_a_schedule_that_is_given_stays(pair, second_runner, fallbacks):
    given = [[1, 4, 5], [5, 9, 0]]
    keys = {"num_speculative_tokens_per_batch_size": given}
    spec = configure(pair.target, msd(pair, **keys))
    assert [list(entry) for entry in spec.num_speculative_tokens_per_batch_size] == given
    assert (spec.num_speculative_tokens, sizes_of(spec), shapes_of(spec)) == (5, [], [])
    assert "num_speculative_tokens_per_batch_size" in fallbacks[0]
    assert sizes_of(configure(pair.target, msd(pair, num_speculative_tokens=4))) == []


def test_model_runner_v1_on_a_gpu_takes_the_drafts_sizes(pair, fallbacks, monkeypatch):
    monkeypatch.setattr(auto_sizes, "runs_v1_on_cpu", lambda: False)
    spec = configure(pair.target, msd(pair, num_speculative_tokens="auto"))
    assert (spec.num_speculative_tokens, shapes_of(spec), sizes_of(spec)) == (5, [], [])
    assert "on a CPU only" in fallbacks[0]


def test_auto_beside_a_size_is_refused(pair):
    with pytest.raises(ConfigError, match=r"got 'auto' beside {'tree_depth': 4}.*Leave the other"):
        configure(pair.target, msd(pair, num_speculative_tokens="auto", tree_depth=4))
    with pytest.raises(ConfigError, match="num_speculative_tokens: got 'automatic'"):
        configure(pair.target, msd(pair, num_speculative_tokens="automatic"))


# What one request may say -----------------------------------------------------------------------


def params(**extra):
    from vllm import SamplingParams

    return SamplingParams(extra_args=extra or None)


@pytest.mark.parametrize(
    ("extra", "limit"),
    [
        ({}, None),
        ({"msd": True}, None),
        ({"msd": False}, 0),
        ({"msd": 0}, 0),
        ({"msd_max_nodes": 8}, 8),
        ({"msd_max_nodes": 0}, 0),
        ({"msd": False, "msd_max_nodes": 8}, 0),
        ({"else": "x"}, None),
    ],
    ids=str,
)
def test_limits_of_a_request(extra, limit):
    assert request_options.node_limit(params(**extra)) == limit


@pytest.mark.parametrize(
    "extra",
    [{"msd": "no"}, {"msd": 2}, {"msd": None}, {"msd_max_nodes": -1}, {"msd_max_nodes": 2.5},
     {"msd_max_nodes": True}, {"msd_max_nodes": "8"}, {"msd_max_nodes": [8]}],
    ids=str,
)  # fmt: skip
def test_values_that_cannot_be_meant_are_refused(pair, extra):
    """By vLLM's own check of a request, which a server answers with 400."""
    spec = configure(pair.target, msd(pair))
    with pytest.raises(VLLMValidationError, match=f"{next(iter(extra))}: got .*, expected"):
        params(**extra)._validate_spec_decode(spec)
    other = configure(pair.target, {"method": "ngram", "num_speculative_tokens": 2})
    params(**extra)._validate_spec_decode(other)  # no business of ours
