"""The three patches of vLLM's argument handling: flags, speculative config, draft config.

A request for MSD is gathered from `speculative_config` and the `--spec-*` flags, the draft is found
and checked, and vLLM is handed an ordinary `eagle` configuration.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_msd.budget import AUTO
from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin import METHOD
from vllm_msd.vllm_plugin.configuration import guards, resolve, values
from vllm_msd.vllm_plugin.configuration.auto_sizes import (
    auto_shapes,
    is_auto,
    schedule_of,
    settings_of,
    sizes_to_schedule,
)
from vllm_msd.vllm_plugin.configuration.hf_config import MSDCheckpointConfig, build_draft_hf_config
from vllm_msd.vllm_plugin.configuration.tree_backend import tree_attention_backend
from vllm_msd.vllm_plugin.registration import DRAFT_ARCHITECTURES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs

    from vllm_msd.draft import MSDDraftConfig
    from vllm_msd.tree.config import TreeConfig

_SPEC_FLAGS = (
    ("--spec-method", "spec_method", "method"),
    ("--spec-model", "spec_model", "model"),
    ("--spec-tokens", "spec_tokens", "num_speculative_tokens"),
)

# The draft config under construction: set while vLLM builds its SpeculativeConfig, read by the
# override that vLLM calls with whatever Transformers made of the draft's config.json.
_building: ContextVar[PreTrainedConfig | None] = ContextVar("msd_draft_hf_config", default=None)


def gather_request(engine_args: EngineArgs) -> dict[str, Any] | None:
    """Merge `speculative_config` and the `--spec-*` flags of a request for MSD.

    Returns:
        the merged config with `method` msd, or None when the request is for something else.

    Raises:
        ConfigError: the config is not a table, something is given twice with two values, or `model`
            is msd under another method.
    """
    config = engine_args.speculative_config
    if config is not None:
        values.check_is_table(config)
    merged: dict[str, Any] = {}
    clashes = []
    for key, value in (config or {}).items():
        name = str(key).replace("-", "_")
        if name in merged and merged[name] != value:
            clashes.append(
                f"speculative_config[{key!r}]={value!r} contradicts {name!r}={merged[name]!r}"
            )
        merged[name] = value
    for flag, attribute, key in _SPEC_FLAGS:
        value = getattr(engine_args, attribute)
        if value is None:
            continue
        if key == "num_speculative_tokens" and _is_served_by_its_name(merged):
            del merged[key]  # the draft's own, which vLLM has put there
        if key in merged and merged[key] != value:
            clashes.append(
                f"{flag} {value} contradicts speculative_config[{key!r}]={merged[key]!r}"
            )
        merged[key] = value
    if isinstance(merged.get("model"), PathLike):
        merged["model"] = fspath(merged["model"])
    method, model = merged.get("method"), merged.get("model")
    if method is None and isinstance(model, str) and resolve.is_msd_draft(model):
        method = merged["method"] = METHOD
    if method != METHOD:
        if model == METHOD:
            raise ConfigError(
                f"speculative model 'msd' was requested with method {method!r}. Leave the method "
                "out or set it to 'msd'."
            )
        if config and METHOD in (config.get("method"), config.get("model")):
            raise ConfigError(f"{'; '.join(clashes)}. Give each setting once.")
        return None
    if clashes:
        raise ConfigError(f"{'; '.join(clashes)}. Give each setting once.")
    return merged


def _is_served_by_its_name(config: dict[str, Any]) -> bool:
    """Whether vLLM has made this config of the draft (`vllm serve DRAFT`), its size unchanged."""
    tokens, model = config.get("num_speculative_tokens"), config.get("model")
    is_ours = config.get("method") == METHOD and isinstance(model, str)
    return is_ours and tokens is not None and tokens == resolve.tokens_of_draft(str(model))


def wrap_create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of `EngineArgs.create_speculative_config`."""

    @functools.wraps(original)
    def create_speculative_config(
        self: EngineArgs,
        target_model_config: ModelConfig,
        target_parallel_config: ParallelConfig,
    ) -> Any:
        request = gather_request(self)
        if request is None:
            return original(self, target_model_config, target_parallel_config)
        guards.check_keys(request)
        values.check_names(request)
        name = resolve.find_draft(target_model_config.model, request.get("model"))
        draft = resolve.read_draft(name, request.get("revision"), self.download_dir)
        shapes = _auto_shapes(self, request, draft, target_model_config, target_parallel_config)
        sizes = settings_of(shapes) if shapes else guards.size_settings(request, draft)
        request = {**request, **sizes}
        scheduled = sizes_to_schedule(self, shapes)
        if scheduled:
            request["num_speculative_tokens_per_batch_size"] = schedule_of(scheduled)
        tree = guards.check_engine(
            self, request, draft, name, target_model_config, target_parallel_config
        )
        backend = None
        if not tree.is_chain:
            backend = tree_attention_backend(self, request, target_model_config)
        if backend is not None:
            if self.attention_config.backend is None:  # the two are exclusive
                self.attention_backend = backend
            request["attention_backend"] = backend.name
        vllm_request = {**request, "method": "eagle", "model": name}
        for key in guards.TREE_KEYS:
            del vllm_request[key]
        hf_config = build_draft_hf_config(
            draft,
            DRAFT_ARCHITECTURES[draft.layer_type],
            vocab_size=target_model_config.get_vocab_size(),
            max_position_embeddings=target_model_config.max_model_len,
            tree=tree,
            auto=shapes,
            sizes=scheduled,
        )
        with _arguments(self, vllm_request), _draft_config(hf_config):
            try:
                return original(self, target_model_config, target_parallel_config)
            except ValidationError as error:
                raise values.in_words(error) from error

    return create_speculative_config


def _auto_shapes(
    engine_args: EngineArgs,
    request: Mapping[str, Any],
    draft: MSDDraftConfig,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> list[TreeConfig]:
    """What the engine may choose from; empty where sizes are given or have to be fixed."""
    if not is_auto(request):
        return []
    try:
        return auto_shapes(engine_args, request, draft, target, parallel)
    except ConfigError as error:
        from vllm.logger import init_logger

        init_logger("vllm.vllm_msd").info("MSD: the sizes are the draft's own. %s", error)
        return []


def wrap_hf_config_override(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of `SpeculativeConfig.hf_config_override`.

    It keeps the original's qualified name (functools.wraps), or the engine's config, which refers
    to it, could not be pickled to a spawned process.
    """

    @functools.wraps(original)
    def hf_config_override(hf_config: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        if hf_config.model_type.startswith("dummy_"):
            # vLLM asks first with an empty config whether the model type would change: it does
            # not, Transformers shall read the checkpoint's own type.
            return original(hf_config, *args, **kwargs)
        draft = _building.get()
        if draft is not None:
            return draft
        names = (hf_config.model_type, getattr(hf_config, "speculators_model_type", None))
        if MSDCheckpointConfig.model_type in names:
            raise ConfigError(
                "this draft is an MSD checkpoint, but another speculative method was requested. "
                "Set the method to 'msd'."
            )
        return original(hf_config, *args, **kwargs)

    return hf_config_override


def wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replacement of `EngineArgs.add_cli_args`: the flags appear in vLLM's own group."""

    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        method = parser._option_string_actions["--spec-method"]
        if method.choices is not None and METHOD not in method.choices:
            method.choices = [METHOD, *method.choices]
        config = parser._option_string_actions["--speculative-config"]
        config.type = values.table_on_the_command_line(config.type)
        group = next(g for g in parser._action_groups if method in g._group_actions)
        group.add_argument(
            "--speculative-model",
            dest="spec_model",
            metavar="msd|PATH|NAME",
            action=SpeculativeModelAction,
            default=None,
            help="Serve with an MSD draft (vllm-msd). 'msd' finds the draft that belongs to the "
            "target; a folder or hub name is taken as given. Same as --spec-method msd "
            "--spec-model, unless --spec-method names another method.",
        )
        group.add_argument(
            "--num-speculative-tokens",
            dest="spec_tokens",
            type=_number_or_auto,
            metavar="N|auto",
            default=None,
            help="Same as --spec-tokens. With an MSD draft the default is 'auto': as many as pay "
            "on this machine under the load of the moment, or the draft's own number where that is "
            "not known.",
        )
        return parser

    return add_cli_args


def _number_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


class SpeculativeModelAction(argparse.Action):
    """Stores `spec_model`, and `spec_method` msd where no method was given.

    Where the target is already known (`vllm serve TARGET ...`), the draft is looked up here too:
    a mistake then ends like any other wrong argument, without a traceback.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.spec_model = values
        if namespace.spec_method is None:
            namespace.spec_method = METHOD
        target = getattr(namespace, "model_tag", None)
        if target is not None and namespace.spec_method == METHOD:
            try:
                resolve.find_draft(target, values)
            except ConfigError as error:
                parser.error(str(error))


@contextmanager
def _arguments(engine_args: EngineArgs, config: dict[str, Any]) -> Iterator[None]:
    """Give `engine_args` one speculative config; its own values come back afterwards, so that
    the same arguments can build an engine config again."""
    before = {name: getattr(engine_args, name) for _, name, _ in _SPEC_FLAGS}
    before["speculative_config"] = engine_args.speculative_config
    try:
        for name in before:
            setattr(engine_args, name, None)
        engine_args.speculative_config = config
        yield
    finally:
        for name, value in before.items():
            setattr(engine_args, name, value)


@contextmanager
def _draft_config(hf_config: PreTrainedConfig) -> Iterator[None]:
    token = _building.set(hf_config)
    try:
        yield
    finally:
        _building.reset(token)
