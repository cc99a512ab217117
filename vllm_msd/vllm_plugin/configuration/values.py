"""Values of the speculative config that cannot be meant: each gets a sentence, not a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_msd.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError

# Read by us before vLLM checks them.
_NAMES = {
    "model": "the draft's folder or hub name, or 'msd' to find it",
    "revision": "a branch, tag or commit on the hub",
    "code_revision": "a branch, tag or commit on the hub",
}


def check_is_table(config: Any) -> None:
    """Refuse a speculative config that is not a table of settings.

    Raises:
        ConfigError: with what it should look like.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"speculative config: got {config!r}, expected a table of settings such as "
            '{"method": "msd", "num_speculative_tokens": 5}.'
        )


def check_names(request: Mapping[str, Any]) -> None:
    """Refuse names that are no text or empty (an empty path would mean the working folder).

    Raises:
        ConfigError: with what was expected.
    """
    for key, expected in _NAMES.items():
        value = request.get(key)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise ConfigError(
                f"speculative_config[{key!r}]: got {value!r}, expected {expected}. Leave it out "
                "for the default."
            )


def in_words(error: ValidationError) -> ConfigError:
    """What pydantic found wrong with a speculative config, a sentence for each setting."""
    sentences = []
    for problem in error.errors(include_url=False):
        key, message = ".".join(map(str, problem["loc"])), problem["msg"].rstrip(".")
        if key:  # otherwise the input is the whole config, target included
            message = f"speculative_config[{key!r}]: got {problem['input']!r}. {message}"
        sentences.append(f"{message}.")
    return ConfigError(" ".join(sentences))


def table_on_the_command_line(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of ``--speculative-config``: vLLM's, but what is not a table ends in a sentence."""

    def parsed(text: str) -> Any:
        try:
            if not text.strip():
                raise ValueError("it is empty")
            config = parse(text)
            if config is not None:
                check_is_table(config)
        except (argparse.ArgumentTypeError, ValueError, RecursionError) as error:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected a JSON table of settings such as "
                '\'{"method": "msd", "num_speculative_tokens": 5}\' (mind the quotes).'
            ) from error
        return config

    return parsed
