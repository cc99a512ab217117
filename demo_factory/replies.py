"""What a target answers to requests of the demo's world."""

from collections.abc import Callable, Sequence

from vllm_msd.training.acceptance import Reply, answer
from vllm_msd.training.targets import Target

from .world import Sample

# In tokens; prompts and replies of the world are well below.
MAX_PROMPT, MAX_REPLY = 1024, 120
BATCH = 50


def greedy_replies(
    target: Target,
    samples: Sequence[Sample],
    max_tokens: int = MAX_REPLY,
    beyond: int = 0,
    report: Callable[[int], None] = lambda done: None,
) -> list[Reply]:
    """Replies to the samples' last questions, in order.

    Args:
        target: who answers.
        samples: requests; like lengths side by side spare padding.
        max_tokens: of a reply.
        beyond: tokens after a reply's end (see `training.acceptance`).
        report: called with the number of requests done.
    """
    renderer = target.renderer([], MAX_PROMPT)
    replies = []
    for start in range(0, len(samples), BATCH):
        chunk = samples[start : start + BATCH]
        prompts = [(item.kind, renderer.ask(item.prompt, item.images)) for item in chunk]
        replies += answer(target, prompts, max_tokens, beyond, BATCH, report)
    return replies


def reply_text(target: Target, reply: Reply) -> str:
    """A reply as plain text."""
    return target.processor.tokenizer.decode(reply.tokens, skip_special_tokens=True).strip()
