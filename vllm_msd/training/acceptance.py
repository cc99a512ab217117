"""How many drafted tokens a target accepts, counted without an engine.

The target says its own greedy replies once. Drafting is then replayed along them: chains for all
rows at once (see `unroll`), trees one verification at a time. The counting is vLLM's, so the
figures are those of its metrics for the same requests.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from vllm_msd.draft import DraftCache, DraftRows, MSDDraft
from vllm_msd.training.data.batches import TokenBatch, collate, kind_of
from vllm_msd.training.data.index import BadRecord, RecordFile
from vllm_msd.training.data.records import BadRecordError
from vllm_msd.training.data.render import Rendered, Renderer
from vllm_msd.training.losses import CHUNK_LOGITS
from vllm_msd.training.profile import NodeCounts, acceptance_profile
from vllm_msd.training.rows import draft_rows
from vllm_msd.training.targets import Features, Target
from vllm_msd.training.unroll import ChainCount, replay_chains, unroll
from vllm_msd.tree import TreeConfig
from vllm_msd.tree.drafting import draft_tree


@dataclass
class Reply:
    """A prompt with the target's reply.

    kind: of work. talk: prompt, reply, and what the target would have said after it; the reply is
    positions `start` to `end`.
    """

    kind: str
    talk: Rendered
    start: int
    end: int

    @property
    def tokens(self) -> list[int]:
        """The reply alone."""
        return self.talk.input_ids[self.start : self.end + 1].tolist()


@dataclass
class Figures:
    """What was counted for one kind of work.

    right, rows: by drafting step, guesses that were the target's choice, of how many.
    nodes: drafted tokens of chains by their path probability.
    """

    count: ChainCount = field(default_factory=ChainCount)
    right: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    nodes: NodeCounts = field(default_factory=NodeCounts)

    def join(self, other: "Figures") -> None:
        """Add another's counts."""
        self.count.verifications += other.count.verifications
        self.count.accepted_at = _sums(self.count.accepted_at, other.count.accepted_at)
        self.right = _sums(self.right, other.right)
        self.rows = _sums(self.rows, other.rows)
        self.nodes.join(other.nodes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: acceptance length, and rates by depth."""
        count = self.count
        table: dict[str, Any] = {
            "acceptance_length": round(count.acceptance_length, 4),
            "verifications": count.verifications,
            "accepted_at_depth": [
                round(n / max(1, count.verifications), 4) for n in count.accepted_at
            ],
        }
        if self.rows:
            pairs = zip(self.right, self.rows, strict=True)
            table["accuracy_at_depth"] = [round(r / max(1, n), 4) for r, n in pairs]
        return table


def greedy_replies(
    target: Target,
    renderer: Renderer,
    records: Iterable[tuple[RecordFile, int]],
    max_tokens: int,
    beyond: int,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[list[Reply], list[BadRecord]]:
    """Let the target answer the last question of every record.

    Args:
        target, renderer: who answers, and how prompts are rendered.
        records: files and record numbers.
        max_tokens: of a reply.
        beyond: tokens after a reply's end, as many as are drafted at once.
        batch_size: prompts at a time.
        report: called with the number of records done.

    Returns:
        Replies of at least two tokens (a shorter one is never drafted), and broken records.
    """
    prompts: list[tuple[str, Rendered]] = []
    bad = []
    for file, number in records:
        try:
            record = file[number]
            prompts.append((kind_of(record, file), renderer.prompt(record)))
        except BadRecordError as error:
            bad.append(BadRecord(file.path.name, file.line(number), str(error)))
    prompts.sort(key=lambda item: len(item[1].input_ids))
    replies = answer(target, prompts, max_tokens, beyond, batch_size, report)
    return [reply for reply in replies if reply.end > reply.start], bad


def answer(
    target: Target,
    prompts: Sequence[tuple[str, Rendered]],
    max_tokens: int,
    beyond: int = 0,
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> list[Reply]:
    """The target's greedy replies to prompts (kind of work, rendering), in their order.

    See `greedy_replies` for the arguments; prompts of like length side by side spare padding.
    """
    replies = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        batch = collate([p for _, p in chunk], target.pad_id, left=True).to(target.device)
        said = target.generate(batch, max_tokens, beyond)
        for (kind, prompt), reply in zip(chunk, said, strict=True):
            length = next((i + 1 for i, t in enumerate(reply) if t in target.end_ids), max_tokens)
            replies.append(_reply(kind, prompt, reply, min(length, max_tokens)))
        report(len(chunk))
    return replies


def _reply(kind: str, prompt: Rendered, reply: list[int], length: int) -> Reply:
    start = len(prompt.input_ids)
    ids = torch.cat([prompt.input_ids, torch.tensor(reply)])
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[start : start + length] = True
    extras = {
        name: torch.nn.functional.pad(value, (0, len(reply)))
        if value.shape == (1, start)
        else value
        for name, value in prompt.extras.items()
    }
    return Reply(kind, Rendered(ids, mask, extras), start, start + length - 1)


def _sums(first: list[int], second: list[int]) -> list[int]:
    """Sums by place; a shorter list counts as zero where it ends."""
    return [a + b for a, b in zip_longest(first, second, fillvalue=0)]


@torch.no_grad()
def chain_acceptance(
    target: Target,
    draft: MSDDraft,
    replies: Sequence[Reply],
    steps: int,
    visual_rows: str = "decoupled",
    batch_size: int = 8,
    seen: Callable[[Features], Features] | None = None,
) -> dict[str, Figures]:
    """Replay greedy chains of `steps` tokens; figures by kind of work.

    seen: changes what the draft is given; the target's replies stay as they are.
    """
    found: dict[str, Figures] = defaultdict(Figures)
    head, ids = _head(target, draft), draft.token_ids
    for start in range(0, len(replies), batch_size):
        chunk = replies[start : start + batch_size]
        batch, rows = _rows(target, chunk, visual_rows, seen)
        truth = batch.input_ids.roll(-2, 1)
        outputs = unroll(draft, rows, steps)
        choices = [_choice(head, ids, out) for out in outputs]
        matches = torch.stack([tokens == truth for tokens, _ in choices]).cpu()
        sure = torch.stack([probability for _, probability in choices]).cpu()
        for row, reply in enumerate(chunk):
            figures = found[reply.kind]
            own = matches[:, row]
            last = len(reply.talk.input_ids) - 1
            chains = replay_chains(own, reply.start, reply.end, figures.count, last)
            _count_nodes(figures.nodes, sure[:, row], chains, last)
            # Step k + 1 at row j goes on from a chain that began k rows before.
            spans = [own[k, reply.start - 1 + k : reply.end - 1] for k in range(steps)]
            figures.right = _sums(figures.right, [int(s.sum()) for s in spans])
            figures.rows = _sums(figures.rows, [len(s) for s in spans])
    return dict(found)


@torch.no_grad()
def tree_acceptance(
    target: Target,
    draft: MSDDraft,
    replies: Sequence[Reply],
    tree: TreeConfig,
    visual_rows: str = "decoupled",
) -> dict[str, Figures]:
    """Replay drafting with dynamic trees, one verification after another; figures by kind."""
    found: dict[str, Figures] = defaultdict(Figures)
    weight = _head(target, draft)

    def head(hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden.to(weight.dtype), weight)

    for reply in replies:
        batch, rows = _rows(target, [reply], visual_rows)
        ids = batch.input_ids[0].tolist()
        cache, fed, newest = DraftCache(), 0, reply.start
        while newest < reply.end:
            # Rows up to the one that pairs with the newest token; their hidden states are the
            # target's, as after a verification.
            part = DraftRows(*(x[:, fed:newest] for x in rows))
            last = draft(*part, cache)[:, -1]
            fed = newest
            root = batch.input_ids[:, newest]
            grown = draft_tree(
                draft, cache, last, root, lambda t: target.embed(t).float(), head, tree.shape
            )
            accepted = _walk(grown.tokens[0].tolist(), grown.parents[0].tolist(), ids[newest + 1 :])
            found[reply.kind].count.add(accepted)
            newest += accepted + 1
    return dict(found)


def _walk(tokens: list[int], parents: list[int], text: list[int]) -> int:
    """How many tokens of the text the tree's best path holds."""
    node = accepted = 0
    for token in text:
        child = next(
            (i for i in range(1, len(tokens)) if parents[i] == node and tokens[i] == token), None
        )
        if child is None:
            break
        node, accepted = child, accepted + 1
    return accepted


def _rows(
    target: Target,
    replies: Sequence[Reply],
    visual_rows: str,
    seen: Callable[[Features], Features] | None = None,
) -> tuple[TokenBatch, DraftRows]:
    batch = collate([reply.talk for reply in replies], target.pad_id).to(target.device)
    features = target.features(batch)
    if seen is not None:
        features = seen(features)
    return batch, draft_rows(features, target.embed, visual_rows)


def _head(target: Target, draft: MSDDraft) -> Tensor:
    """The target's head ``[V, H]``, or a draft vocabulary's rows of it."""
    return target.head if draft.token_ids is None else target.head[draft.token_ids]


def _count_nodes(nodes: NodeCounts, sure: Tensor, chains: list[tuple[int, int]], last: int) -> None:
    """Count the nodes of chains.

    Behind a chain's first wrong token its probabilities are those of the text's tokens, which
    `unroll` goes on with: an estimate of what the draft would think of its own.

    Args:
        sure: ``[K, S]`` the probability of the draft's choice.
        chains: row of step 1 and accepted tokens of each.
        last: position of the last known token; row j of any step guesses number j + 2.
    """
    for first, accepted in chains:
        depths = range(min(len(sure), last - 1 - first))
        path = torch.cumprod(torch.stack([sure[k, first + k] for k in depths]), 0)
        for depth, probability in zip(depths, path.tolist(), strict=True):
            nodes.add(probability, depth < accepted)


def _choice(head: Tensor, token_ids: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
    """The token that a head finds best on a draft's outputs ``[B, S, H]``, and its probability."""
    rows = out.flatten(0, 1).to(head.dtype)
    found = []
    for chunk in rows.split(max(1, CHUNK_LOGITS // head.shape[0])):
        logits = torch.nn.functional.linear(chunk, head).float()
        best, place = logits.max(-1)
        found.append((place, (best - logits.logsumexp(-1)).exp()))
    places, sure = (torch.cat(parts).view(out.shape[:2]) for parts in zip(*found, strict=True))
    return places if token_ids is None else token_ids[places], sure


def merge(parts: Iterable[dict[str, Figures]]) -> dict[str, Figures]:
    """Figures of several processes, added up by kind."""
    found: dict[str, Figures] = defaultdict(Figures)
    for part in parts:
        for kind, figures in part.items():
            found[kind].join(figures)
    return dict(found)


def summary(found: dict[str, Figures]) -> dict[str, Any]:
    """Figures for JSON: by kind, and over all requests."""
    everything = Figures()
    for figures in found.values():
        everything.join(figures)
    kinds = {kind: found[kind].as_dict() for kind in sorted(found)}
    count = everything.count
    profile = acceptance_profile(count.verifications, count.accepted_at, everything.nodes)
    # A tree's counts are not those of a chain.
    known = {"profile": profile} if everything.rows and profile else {}
    return {"all": everything.as_dict(), "kinds": kinds, **known}
