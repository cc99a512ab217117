"""Does a sample of token sequences follow the target's own law? Exact tables and chi-square tests.

The law is the target model alone, evaluated by Hugging Face (no vLLM code takes part): for every
sequence that was drawn, the probability of each token given the prompt and the tokens before it,
after temperature, min-p, top-k and top-p. The statistic compares drawn and expected counts prefix
by prefix, so a sampler that is right on average and wrong after some prefix is found too.

Not covered: independence between the sequences of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIN_EXPECTED = 5.0  # cells expected to hold fewer draws than this are pooled


def warp(
    logits: torch.Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Probabilities after temperature, min-p, top-k and top-p, in vLLM's order.

    Min-p keeps the tokens that have at least ``min_p`` times the best one's probability (Nguyen et
    al., 2024), top-k the ``top_k`` best of them. Top-p looks at what is left, with a sum of 1, and
    keeps the smallest set of most likely tokens whose mass reaches ``top_p`` (Holtzman et al.,
    2020): a token goes when the mass of the more likely ones has reached ``top_p`` already.

    Args:
        logits: ``[..., V]`` raw logits, any float type.
        temperature: above 0.
        top_p: in (0, 1].
        top_k: 0 for all tokens.
        min_p: in [0, 1).

    Returns:
        ``[..., V]`` float64, rows summing to 1.
    """
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    ordered, order = probs.sort(dim=-1, descending=True)
    ordered = torch.where(ordered >= min_p * ordered[..., :1], ordered, 0.0)
    if top_k:
        ordered[..., top_k:] = 0.0
    ordered = ordered / ordered.sum(-1, keepdim=True)
    mass_before = ordered.cumsum(-1) - ordered
    kept = torch.where(mass_before < top_p, ordered, 0.0) if top_p < 1.0 else ordered
    probs = torch.zeros_like(probs).scatter(-1, order, kept)
    return probs / probs.sum(-1, keepdim=True)


@dataclass(frozen=True)
class ChiSquare:
    """A Pearson statistic: ``p`` is the chance of one at least this large under the law."""

    statistic: float
    cells: int  # degrees of freedom
    draws: int
    p: float


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> ChiSquare:
    """Pearson's test of several multinomials at once.

    Args:
        counts: ``[P, V]`` integer, draws of each token after each of P prefixes.
        probs: ``[P, V]`` float64, the law of the token after each prefix.

    Returns:
        The summed statistic over prefixes; cells expected to hold fewer than ``MIN_EXPECTED`` draws
        are pooled within their prefix. A token drawn although its probability is zero makes the
        statistic infinite.
    """
    statistic, freedom = 0.0, 0
    for observed, law in zip(counts.double(), probs.double(), strict=True):
        if bool((observed[law == 0] > 0).any()):
            return ChiSquare(float("inf"), 1, int(counts.sum()), 0.0)
        expected = law * observed.sum()
        large = expected >= MIN_EXPECTED
        seen, due = observed[large], expected[large]
        rest_seen, rest_due = observed[~large].sum(), expected[~large].sum()
        if rest_due >= MIN_EXPECTED or not len(due):
            seen, due = torch.cat([seen, rest_seen[None]]), torch.cat([due, rest_due[None]])
        else:  # too little for a cell of its own: the smallest of the others takes it
            smallest = due.argmin()
            seen[smallest] += rest_seen
            due[smallest] += rest_due
        if len(due) > 1:
            statistic += float(((seen - due) ** 2 / due).sum())
            freedom += len(due) - 1
    return ChiSquare(statistic, freedom, int(counts.sum()), upper_tail(statistic, freedom))


def upper_tail(statistic: float, freedom: int) -> float:
    """``P(X >= statistic)`` for a chi-square variable with ``freedom`` degrees of freedom."""
    if freedom == 0:
        return 1.0
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@dataclass(frozen=True)
class SequenceLaw:
    """The target's probabilities along a set of sequences.

    Attributes:
        prefixes: M sequences of T - 1 tokens each.
        probs: ``[M, T, V]`` float64; ``probs[m, t]`` is the law of the token that follows the first
            ``t`` tokens of prefix ``m``.
    """

    prefixes: list[tuple[int, ...]]
    probs: torch.Tensor

    def after(self, beginnings: list[tuple[int, ...]]) -> torch.Tensor:
        """The law after each of P equally long beginnings of the known prefixes: ``[P, V]``."""
        step = len(beginnings[0])
        rows = {prefix[:step]: row for row, prefix in enumerate(self.prefixes)}
        return self.probs[[rows[beginning] for beginning in beginnings], step]


def check_sequences(draws: list[tuple[int, ...]], law: SequenceLaw) -> list[ChiSquare]:
    """One test per position: token ``t`` of the draws given the ``t`` tokens before it.

    Args:
        draws: N sequences of T token ids; ``law`` knows the first T - 1 tokens of each.

    Returns:
        T results; the first tests the first token on its own.
    """
    results = []
    for step in range(len(draws[0])):
        beginnings: dict[tuple[int, ...], int] = {}
        rows = [beginnings.setdefault(draw[:step], len(beginnings)) for draw in draws]
        counts = torch.zeros(len(beginnings), law.probs.shape[-1], dtype=torch.long)
        cell = torch.tensor(rows), torch.tensor([draw[step] for draw in draws])
        counts.index_put_(cell, torch.ones(1, dtype=torch.long), accumulate=True)
        results.append(chi_square(counts, law.after(list(beginnings))))
    return results
