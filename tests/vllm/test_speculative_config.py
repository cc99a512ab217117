"""From flags and dictionaries to vLLM's own configuration, without starting an engine."""

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.common import tiny
from vllm_msd.draft import MSDDraftConfig
from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.vllm_plugin import plugin
from vllm_msd.vllm_plugin.configuration import engine_args, guards, resolve
from vllm_msd.vllm_plugin.configuration import tree_settings as settings

ARCHITECTURES = {
    "llava": ("EagleMsdLlamaForCausalLM", "LlamaConfig"),
    "llava_next": ("EagleMsdLlamaForCausalLM", "LlamaConfig"),
    "llava_onevision": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
    "qwen2_vl": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
    "qwen2_5_vl": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
    "qwen3_vl": ("EagleMsdQwen2ForCausalLM", "Qwen2Config"),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    plugin.register()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {kind: tiny.build_pair(root / kind, kind) for kind in tiny.KINDS}


@pytest.fixture(scope="module")
def pair(pairs):
    return pairs["llava"]


@pytest.fixture(scope="module")
def parser():
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def configure(target, speculative_config, **engine):
    """vLLM's SpeculativeConfig for these arguments."""
    args = EngineArgs(
        model=target, speculative_config=speculative_config, max_model_len=512, **engine
    )
    return args.create_engine_config().speculative_config


def msd(pair, **keys):
    return {"method": "msd", "model": pair.draft, **keys}


# Building the config


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, layout) for kind in tiny.KINDS for layout in ("draft", "msd")]
    + [(kind, "published") for kind in tiny.PUBLISHED_KINDS],
)
def test_each_layout_becomes_our_draft_class(pairs, kind, layout):
    pair = pairs[kind]
    model = "msd" if layout == "msd" else getattr(pair, layout)
    spec = configure(pair.target, {"method": "msd", "model": model})
    hf_config = spec.draft_model_config.hf_config
    architecture, class_name = ARCHITECTURES[kind]

    assert spec.method == "eagle" and spec.use_eagle()
    assert spec.model == (pair.published if layout == "published" else pair.draft)
    assert hf_config.architectures == [architecture]
    assert spec.draft_model_config.architecture == architecture
    assert type(hf_config.model).__name__ == class_name
    assert hf_config.vocab_size == spec.target_model_config.get_vocab_size()
    assert not spec.draft_model_config.uses_mrope
    draft = MSDDraftConfig.from_dict(hf_config.msd_draft)
    assert draft.hidden_size == hf_config.hidden_size == tiny.HIDDEN
    assert hf_config.rope_parameters["rope_theta"] == draft.rope_theta


def test_number_of_tokens_comes_from_the_draft_unless_given(pair, tmp_path):
    config = json.loads((Path(pair.draft) / "config.json").read_text())
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").symlink_to(Path(pair.draft) / "model.safetensors")
    (draft / "config.json").write_text(json.dumps({**config, "num_speculative_tokens": 4}))
    request = {"method": "msd", "model": str(draft)}
    assert configure(pair.target, request).num_speculative_tokens == 4
    request["num_speculative_tokens"] = 2
    assert configure(pair.target, request).num_speculative_tokens == 2


def test_positions_of_a_short_draft_grow_with_the_target(pair, tmp_path):
    """Published LLaVA drafts say 2048 positions, their targets have 4096."""
    config = json.loads((Path(pair.published) / "config.json").read_text())
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in Path(pair.published).iterdir():
        if file.name != "config.json":
            (draft / file.name).symlink_to(file)
    (draft / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    spec = configure(pair.target, {"method": "msd", "model": str(draft)})
    assert spec.draft_model_config.hf_config.max_position_embeddings == 512
    assert spec.draft_model_config.max_model_len == 512


def test_config_travels_to_a_spawned_process(pair):
    """The spawned engine unpickles it; the override is pickled by its qualified name."""
    config = EngineArgs(model=pair.target, speculative_config=msd(pair)).create_engine_config()
    copy = pickle.loads(pickle.dumps(config)).speculative_config.draft_model_config
    assert (
        copy.hf_config.msd_draft == config.speculative_config.draft_model_config.hf_config.msd_draft
    )
    assert copy.hf_overrides is not None
    override = SpeculativeConfig.hf_config_override
    assert pickle.loads(pickle.dumps(override)) is override


def test_arguments_can_be_used_twice(pair):
    args = EngineArgs(model=pair.target, speculative_config={"model": "msd"}, spec_tokens=3)
    for _ in range(2):
        spec = args.create_engine_config().speculative_config
        assert (spec.method, spec.num_speculative_tokens) == ("eagle", 3)
    assert args.speculative_config == {"model": "msd"} and args.spec_tokens == 3


def test_other_methods_are_left_alone(pair):
    spec = configure(pair.target, {"method": "ngram", "num_speculative_tokens": 2})
    assert spec.method == "ngram"
    assert configure(pair.target, None) is None


# The command line


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        (["--speculative-model", "msd"], 5),
        (["--speculative-model=msd", "--num-speculative-tokens", "3"], 3),
        (["--speculative_model", "msd", "--num_speculative_tokens=3"], 3),
        (["--speculative-model", "DRAFT"], 5),
        (["--speculative-model", "PUBLISHED", "--spec-tokens", "2"], 2),
        (["--spec-method", "msd"], 5),
        (["--spec-method", "msd", "--spec-model", "DRAFT", "--spec-tokens", "4"], 4),
        (["--spec-model", "msd"], 5),
        (["--spec-model", "DRAFT"], 5),
        (["--speculative-config", '{"method": "msd", "num_speculative_tokens": 6}'], 6),
        (["--speculative-config", '{"method": "msd", "model": "DRAFT"}'], 5),
        (["--speculative-config.method", "msd", "--speculative-config.model", "DRAFT"], 5),
        (["--speculative-config", '{"num-speculative-tokens": 7}', "--speculative-model=msd"], 7),
        (["--speculative-config", '{"method": "msd"}', "--num-speculative-tokens", "1"], 1),
        (["--speculative-config", '{"method": "msd"}', "--speculative-model", "DRAFT"], 5),
    ],
    ids=str,
)
def test_command_lines(pair, parser, flags, tokens):
    flags = [f.replace("DRAFT", pair.draft).replace("PUBLISHED", pair.published) for f in flags]
    args = parser.parse_args(["--model", pair.target, "--max-model-len", "512", *flags])
    spec = AsyncEngineArgs.from_cli_args(args).create_engine_config().speculative_config
    assert (spec.method, spec.num_speculative_tokens) == ("eagle", tokens)
    assert spec.draft_model_config.architecture == "EagleMsdLlamaForCausalLM"
    assert spec.model == (pair.published if pair.published in flags else pair.draft)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--speculative-config", '{"method": "msd"}', "--spec-method", "eagle"],
            r"--spec-method eagle contradicts speculative_config\['method'\]='msd'",
        ),
        (
            ["--speculative-config", '{"method": "eagle"}', "--speculative-model", "msd"],
            r"--spec-method msd contradicts speculative_config\['method'\]='eagle'",
        ),
        (
            [
                "--speculative-config",
                '{"method": "msd", "num_speculative_tokens": 3}',
                "--num-speculative-tokens=4",
            ],
            r"--spec-tokens 4 contradicts speculative_config\['num_speculative_tokens'\]=3",
        ),
        (["--spec-method", "eagle", "--spec-model", "msd"], "Leave the method out or set it"),
        (["--speculative-model", "no-such-draft"], "neither a folder nor a hub name"),
        (["--speculative-model", "msd", "--num-speculative-tokens", "0"], "from 1 to 128"),
    ],
    ids=str,
)
def test_contradictions_are_named(pair, parser, flags, message):
    args = parser.parse_args(["--model", pair.target, *flags])
    with pytest.raises(ConfigError, match=message):
        AsyncEngineArgs.from_cli_args(args).create_engine_config()


def test_speculative_model_leaves_a_named_method_alone(parser):
    for flags in (
        ["--spec-method", "eagle", "--speculative-model", "org/head"],
        ["--speculative-model", "org/head", "--spec-method", "eagle"],
    ):
        args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "x", *flags]))
        assert (args.spec_method, args.spec_model) == ("eagle", "org/head")
        assert engine_args.gather_request(args) is None


@pytest.mark.parametrize(
    ("target", "model", "message"),
    [
        ("org/unknown", "msd", "no MSD draft is known for the target org/unknown"),
        ("llava-hf/llava-1.5-7b-hf", "nonsense", "neither a folder nor a hub name"),
    ],
)
def test_serve_ends_at_a_wrong_draft_without_a_traceback(capsys, target, model, message):
    parser = FlexibleArgumentParser()
    parser.add_argument("model_tag", nargs="?")
    parser = AsyncEngineArgs.add_cli_args(parser)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([target, "--speculative-model", model])
    assert message in capsys.readouterr().err
    other = parser.parse_args([target, "--spec-method", "eagle", "--speculative-model", model])
    assert other.spec_method == "eagle"


def test_flags_are_in_the_help(parser, monkeypatch, capsys):
    for keyword, expected in [
        ("VllmConfig", ["--speculative-model", "--num-speculative-tokens", "--spec-method {msd,"]),
        ("speculative-model", ["--speculative-model msd|PATH|NAME"]),
    ]:
        monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
        with pytest.raises(SystemExit):
            parser.parse_args([f"--help={keyword}"])
        text = capsys.readouterr().out
        assert all(flag in text for flag in expected)


# Trees


def tree(nodes, depth, top_k):
    return {"num_speculative_tokens": nodes, "tree_depth": depth, "tree_top_k": top_k}


def tree_of(speculative_config):
    vllm_config = SimpleNamespace(speculative_config=speculative_config)
    config = settings.tree_config(vllm_config)
    assert settings.wants_trees(vllm_config) == (not config.is_chain)
    return config.num_nodes, config.depth, config.top_k


@pytest.fixture
def tree_pair(pair, tmp_path):
    """A pair whose draft is served as a tree unless told otherwise."""
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in Path(pair.draft).iterdir():
        (draft / file.name).symlink_to(file)
    config = json.loads((draft / "config.json").read_text())
    config["target"]["name_or_path"] = pair.target
    config |= tree(12, 4, 3)
    (draft / "config.json").unlink()
    (draft / "config.json").write_text(json.dumps(config))
    return dataclasses.replace(pair, draft=str(draft))


def test_without_tree_settings_a_chain(pair):
    assert tree_of(configure(pair.target, msd(pair))) == (5, 5, 1)
    assert tree_of(configure(pair.target, msd(pair, num_speculative_tokens=3))) == (3, 3, 1)


def test_tree_of_the_request(pair):
    config = configure(pair.target, msd(pair, **tree(24, 5, 6)))
    assert tree_of(config) == (24, 5, 6)
    assert config.num_speculative_tokens == 24
    # It travels to the workers in the draft's config.
    assert tree_of(pickle.loads(pickle.dumps(config))) == (24, 5, 6)


def test_tree_of_the_draft_and_what_overrides_it(tree_pair):
    def asked(**keys):
        return tree_of(configure(tree_pair.target, msd(tree_pair, **keys)))

    assert asked() == (12, 4, 3)
    assert asked(num_speculative_tokens=20) == (20, 4, 3)
    assert asked(tree_depth=3) == (12, 3, 3)
    assert asked(tree_top_k=1) == (12, 12, 1)
    assert asked(tree_top_k=1, num_speculative_tokens=5) == (5, 5, 1)


class OnGPU:
    """The platform as it says of itself on a GPU; the engine's config is not built further."""

    def is_cuda(self):
        return True


def test_attention_backend_of_trees_on_a_gpu(pair, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", OnGPU())

    def backend(request=None, **engine):
        arguments = EngineArgs(model=pair.target, **engine)
        return guards.tree_attention_backend(arguments, request or {})

    assert backend().name == "TRITON_ATTN"
    assert backend(attention_backend="TRITON_ATTN").name == "TRITON_ATTN"
    assert backend(attention_config={"backend": "TRITON_ATTN"}).name == "TRITON_ATTN"
    for request, engine in (
        ({}, {"attention_backend": "FLASH_ATTN"}),
        ({}, {"attention_config": {"backend": "FLASH_ATTN"}}),
        ({"attention_backend": "FLASH_ATTN"}, {}),
    ):
        with pytest.raises(ConfigError, match="got FLASH_ATTN, but draft trees on a GPU need"):
            backend(request, **engine)


def test_min_p_and_logit_bias_only_with_trees(pair):
    chain = configure(pair.target, msd(pair))
    trees = configure(pair.target, msd(pair, **tree(12, 4, 3)))
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={3: 2.0})):
        params._validate_spec_decode(trees)
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
            params._validate_spec_decode(chain)


def test_tree_from_the_command_line(parser, pair):
    flags = ["--speculative-model", pair.draft, "--num-speculative-tokens", "12"]
    flags += ["--speculative-config.tree_depth", "4", "--speculative-config.tree_top_k", "3"]
    args = parser.parse_args(["--model", pair.target, *flags])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert tree_of(config.speculative_config) == (12, 4, 3)


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_speculativ_tokens": 3}, "'num_speculativ_tokens'.*Did you mean 'num_speculative_t"),
        ({"zzz": 3}, r"'zzz'\] is not a known setting. Known: .*num_speculative_tokens"),
        ({"tree_depth": 4}, "tree_depth: got 4 without tree_top_k"),
        ({"tree_top_k": 4}, "tree_top_k: got 4 without tree_depth"),
        ({"tree_dept": 4}, "Did you mean 'tree_depth'"),
        (tree(24, 8, 4), "tree_depth of at most 7"),
        (tree(64, 5, 8), "at most 63 with a tree"),
        (tree(12, 3, 3) | {"draft_sample_method": "probabilistic"}, "Only 'greedy' does"),
        (tree(12, 3, 3) | {"rejection_sample_method": "block"}, "Only 'standard' does"),
        ({"prompt_lookup_max": 4}, "has no meaning for the method 'msd'"),
        ({"parallel_drafting": True}, "has no meaning for the method 'msd'"),
        ({"tensor_parallel_size": 2}, "target's tensor parallel size"),
        ({"disable_padded_drafter_batch": True}, "does not work with MSD"),
        ({"rejection_sample_method": "fly"}, "'fly' changes the output"),
        ({"num_speculative_tokens": 129}, "got 129, expected a whole number from 1 to 128"),
        ({"num_speculative_tokens": "5"}, "got '5', expected a whole number"),
        ({"num_speculative_tokens": True}, "got True, expected a whole number"),
        ({"draft_tensor_parallel_size": 2}, "split over 1 ranks"),
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
        ({"max_num_batched_tokens": 12, "max_num_seqs": 1}, "at least 13 .*the rows of one tree"),
        ({"max_num_batched_tokens": 40, "max_num_seqs": 14}, "at least 42 .*one level"),
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


def test_hub_draft_that_cannot_be_fetched(pair, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(name, **_):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"org/draft could not be fetched.*no network"):
        configure(pair.target, {"method": "msd", "model": "org/draft"})


def test_hub_draft_is_checked_in_the_cache_and_served_by_name(pair, monkeypatch):
    import huggingface_hub

    calls = []

    def download(name, **kwargs):
        calls.append((name, kwargs["revision"], kwargs["cache_dir"]))
        return pair.draft

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    draft = resolve.read_draft("org/draft", "v1", "/cache")
    assert draft.hidden_size == tiny.HIDDEN
    assert calls == [("org/draft", "v1", "/cache")]
