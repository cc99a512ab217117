"""Giving a draft a vocabulary of its own, without training."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from vllm_msd.draft import MSDDraftConfig
from vllm_msd.draft.vocabulary import OFFSETS, check_token_ids, offsets_of


def with_vocabulary(
    config: MSDDraftConfig, state: Mapping[str, Tensor], token_ids: Tensor
) -> tuple[MSDDraftConfig, dict[str, Tensor]]:
    """A draft that proposes these tokens alone; its weights are as they were.

    Args:
        config, state: of the draft, as `load_draft` gives them.
        token_ids: int64 ``[D]``, kept in ascending order, so that of equally likely tokens the same
            one is proposed as before.

    Raises:
        ConfigError: an id that the target does not have, or one that comes twice.
    """
    token_ids = token_ids.sort().values
    check_token_ids(token_ids, config.num_token_ids, "the target's vocabulary")
    trimmed = replace(config, draft_vocab_size=len(token_ids))
    return trimmed, {**state, OFFSETS: offsets_of(token_ids)}
