"""Settings, engines, targets and drafts that do not work with MSD, each refused with its reason."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.common.configuring import configure, msd, tree
from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.vllm_plugin.configuration import guards

pytestmark = pytest.mark.usefixtures("registered")


def by_batch_size(*schedule):
    return {"num_speculative_tokens_per_batch_size": list(schedule)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_speculativ_tokens": 3}, "'num_speculativ_tokens'.*Did you mean 'num_speculative_t"),
        ({"zzz": 3}, r"'zzz'\] is not a known setting. Known: .*num_speculative_tokens"),
        ({"tree_depth": 4}, "tree_depth: got 4 without tree_top_k"),
        ({"tree_top_k": 4}, "tree_top_k: got 4 without tree_depth"),
        ({"tree_dept": 4}, "Did you mean 'tree_depth'"),
        (tree(24, 18, 4), "tree_depth of at most 17"),
        (tree(64, 5, 8), "at most 63 with a tree"),
        (tree(12, 3, 3) | {"draft_sample_method": "probabilistic"}, "Only 'greedy' does"),
        (tree(12, 3, 3) | {"rejection_sample_method": "block"}, "Only 'standard' does"),
        (tree(12, 3, 3) | {"enable_adaptive_verification": True}, "chains by that on the device"),
        ({"prompt_lookup_max": 4}, "has no meaning for the method 'msd'"),
        ({"parallel_drafting": True}, "has no meaning for the method 'msd'"),
        ({"tensor_parallel_size": 2}, "target's tensor parallel size"),
        ({"disable_padded_drafter_batch": True}, "does not work with MSD"),
        ({"rejection_sample_method": "fly"}, "'fly' changes the output"),
        ({"num_speculative_tokens": 129}, "got 129, expected a whole number from 1 to 128"),
        ({"num_speculative_tokens": "5"}, "got '5', expected a whole number"),
        ({"num_speculative_tokens": True}, "got True, expected a whole number"),
        ({"draft_tensor_parallel_size": 2}, "split over 1 ranks"),
        ({"num_speculative_tokens_per_batch_size": []}, "expected a list of .* not be empty"),
        (by_batch_size([2, 4, 3]), "Batch sizes start at 1 .* must start at 1"),
        (by_batch_size([1, 4, 3], [4, 9, 2]), "non-overlapping"),
        (by_batch_size([1, 4, "many"]), "expected a list of"),
        (by_batch_size([1, 4, 13]) | tree(12, 3, 3), "got 13 drafted tokens, expected at most"),
    ],
    ids=str,
)
def test_settings_that_do_not_work(pair, keys, message):
    with pytest.raises(ConfigError, match=message):
        configure(pair.target, msd(pair, **keys))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 .* Use tensor parallelism"),
        (
            {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
            "decode_context_parallel_size=2 does not work",
        ),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size=2 does not work"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"runner": "pooling"}, "text generation"),
        ({"load_format": "sharded_state"}, "draft_load_config"),
    ],
    ids=str,
)
def test_engines_that_do_not_work(pair, engine, message):
    with pytest.raises(ConfigError, match=message):
        configure(pair.target, msd(pair), **engine)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"max_num_batched_tokens": 12, "max_num_seqs": 1}, "at least 13 .*its nodes, or the rows"),
        ({"enable_dbo": True}, "enable_dbo does not work with a draft tree"),
        ({"logits_processors": ["a:b"]}, "logits_processors does not work with a draft tree"),
        ({"data_parallel_size": 2}, "data_parallel_size=2 does not work with a draft tree"),
        ({"kv_transfer_config": {"kv_role": "kv_both"}}, "kv_transfer_config does not work"),
    ],
    ids=str,
)
def test_engines_that_do_not_work_with_trees(pair, engine, message):
    with pytest.raises(ConfigError, match=message):
        configure(pair.target, msd(pair, **tree(12, 3, 3)), **engine)


def test_a_quantized_head_beside_a_draft_vocabulary(pair, monkeypatch):
    """vLLM 0.33's; 0.32 does not know the setting, so it is not looked up here."""
    check = guards.check_engine

    def with_vocabulary(engine_args, request, draft, *rest):
        return check(engine_args, request, replace(draft, draft_vocab_size=64), *rest)

    monkeypatch.setattr(guards, "check_keys", lambda request: None)
    monkeypatch.setattr(guards, "check_engine", with_vocabulary)
    with pytest.raises(ConfigError, match="this draft takes 64 rows of it"):
        configure(pair.target, msd(pair, draft_lm_head_quantization="fp8"))


def test_fewer_tokens_than_the_rows_that_draft(pair):
    """More than the nodes that are kept: four levels of ten."""
    with pytest.raises(ConfigError, match="max_num_batched_tokens=40: expected at least 41"):
        configure(pair.target, msd(pair, **tree(30, 5, 10)), max_num_batched_tokens=40)


def test_fewer_tokens_than_the_context(pair):
    args = EngineArgs(
        model=pair.target, max_model_len=16, speculative_config=msd(pair, num_speculative_tokens=16)
    )
    with pytest.raises(ConfigError, match="from 1 to 15"):
        args.create_engine_config()


def test_draft_of_another_family(pairs):
    with pytest.raises(CheckpointError, match="family"):
        configure(pairs["llava"].target, msd(pairs["qwen2_vl"]))


def test_target_without_a_language_model_of_the_right_type(pair, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    for file in Path(pair.target).iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((target / "config.json").read_text())
    config["text_config"]["model_type"] = "mistral"
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="language model of type 'llama', got 'mistral'"):
        configure(str(target), msd(pair))


def test_target_of_another_architecture(pair, monkeypatch):
    monkeypatch.delitem(guards.SUPPORTED_TARGETS, "LlavaForConditionalGeneration")
    with pytest.raises(
        ConfigError, match=r"LlavaForConditionalGeneration\. Supported: LlavaNextForC"
    ):
        configure(pair.target, msd(pair))


def test_msd_draft_under_another_method(pair):
    with pytest.raises(ValueError, match="Set the method to 'msd'"):
        configure(
            pair.target, {"method": "eagle", "model": pair.draft, "num_speculative_tokens": 3}
        )
