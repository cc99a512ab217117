"""The answers in the report: one card a request, and one verified tree as a picture."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from PIL import Image

from vllm_msd.demo.report.tree_picture import tells, tree_svg
from vllm_msd.demo.samples import KIND_NAMES, HeldOutSample
from vllm_msd.demo.scoring import score
from vllm_msd.measure.compare import Comparison
from vllm_msd.measure.engine import Answer
from vllm_msd.measure.report.parts import number


def draft_tree(comparisons: Sequence[Comparison], text_of: Callable[[int], str]) -> str:
    """The picture of one verified tree with where it comes from; empty when there was none."""
    shown = max(
        (
            (tree, comparison, answer)
            for comparison in comparisons
            for answer in comparison.drafted.values()
            for tree in answer.trees
        ),
        key=lambda candidate: tells(candidate[0]),
        default=None,
    )
    if shown is None:
        return ""
    tree, comparison, answer = shown
    question = _text(comparison.sample.prompt[-1])
    so_far = "".join(answer.pieces[: tree.before]).strip()
    return (
        "<h2>One draft tree</h2><p>One verification of a request of this run. To "
        f"<b>{escape(question)}</b> the answer so far was <b>{escape(so_far)}</b>. The draft then "
        f"proposed {len(tree.tokens) - 1} tokens, and the target checked all of them in one step. "
        f"It accepted the {len(tree.path) - 1} on the filled path and added one of its own "
        "(dashed). Below a parent the draft's guesses stand from the likeliest down; rest the "
        'pointer on one to see its fate.</p><div class="panel scroll">'
        f"{tree_svg(tree, text_of)}</div>"
    )


def _text(message: dict[str, Any]) -> str:
    return "".join(p["text"] for p in message["content"] if p["type"] == "text").strip()


def card(comparison: Comparison) -> str:
    """One request: its image, the conversation, the answer, and how it was decoded."""
    sample = comparison.sample
    images = "".join(
        f'<img src="{_data_uri(image)}" alt="image of this request">' for image in sample.images
    )
    turns = []
    for index, message in enumerate(sample.prompt):
        last = index == len(sample.prompt) - 1
        who = "user" if message["role"] == "user" else "assistant"
        turns.append(
            f'<p class="turn {who}{"" if last else " earlier"}">{escape(_text(message))}</p>',
        )
    tags = [KIND_NAMES[sample.kind]]
    for name, answer in comparison.drafted.items():
        length = 1 + answer.num_accepted_tokens / answer.num_drafts if answer.num_drafts else None
        tags.append(f"{name}: {number(length)} tokens per verification")
    if isinstance(sample, HeldOutSample):
        right = score(sample, comparison.plain.text)
        tags.append("right" if right >= 1 else "wrong" if right <= 0 else f"score {right:.2f}")
    differing = [name for name in comparison.drafted if not comparison.identical(name)]
    same = '<span class="tag">same text without MSD</span>'
    if differing:
        same = (
            f'<span class="tag differs">differs without MSD: {escape(", ".join(differing))}</span>'
        )
    other = ""
    if differing:
        other = (
            '<p class="soft">Without MSD:</p>'
            f'<p class="answer">{escape(comparison.plain.text.strip())}</p>'
        )
    *_, shown = comparison.drafted.values()
    return (
        f'<div class="card"><div>{images or "<div class=none>no image</div>"}</div><div>'
        f'<div class="tags">{"".join(f"<span class=tag>{escape(t)}</span>" for t in tags)}{same}'
        f'</div>{"".join(turns)}<p class="answer">{_marked(shown)}</p>{other}</div></div>'
    )


def _marked(answer: Answer) -> str:
    """The answer with runs of accepted tokens in ``<mark>``."""
    runs: list[tuple[bool, str]] = []
    for piece, accepted in zip(answer.pieces, answer.accepted, strict=True):
        if runs and runs[-1][0] == accepted:
            runs[-1] = (accepted, runs[-1][1] + piece)
        else:
            runs.append((accepted, piece))
    if runs:
        runs[0] = (runs[0][0], runs[0][1].lstrip())
    return "".join(
        f"<mark>{escape(text)}</mark>" if accepted and text else escape(text)
        for accepted, text in runs
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
