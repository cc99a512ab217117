"""Bugs of the kind that only graphs show, done to a Model Runner V2 whose graphs were captured."""

from typing import Any

KEPT: list[Any] = []  # what its owner has let go of and somebody else still holds


def freed_lengths(runner: Any) -> None:
    """The lengths' buffer is made anew; the graphs hold the address of one that is gone."""
    runner.input_buffers.seq_lens = runner.input_buffers.seq_lens.clone()


def stale_lengths(runner: Any) -> None:
    """As above, and the old one lives on: graphs read old values."""
    KEPT.append(runner.input_buffers.seq_lens)
    runner.input_buffers.seq_lens = KEPT[-1].clone()


def stale_draft_tokens(runner: Any) -> None:
    """The drafted tokens' buffer moves after the capture: what graphs draft never arrives."""
    KEPT.append(runner.speculator.draft_tokens)
    runner.speculator.draft_tokens = KEPT[-1].clone()


def stale_parents(runner: Any) -> None:
    """The trees' parents move after the capture: what graphs grow never arrives."""
    store = runner.model_state.store
    KEPT.append(store.parents)
    store.parents = KEPT[-1].clone()
