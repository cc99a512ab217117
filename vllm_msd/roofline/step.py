"""The time of one serving step, with a draft or without: `predict`.

Every part of a step takes the longer of its bytes over the bandwidth and its operations over what
the matrix units sustain. Weights are read once a pass, keys and values once a request; activations
are left out, they mostly stay in the L2 cache. All requests decode, with the same context.
"""

import math
from dataclasses import dataclass

from vllm_msd.kernels.tree_attention.launch import choose_config
from vllm_msd.roofline.launches import (
    COSTS,
    LAUNCHES,
    TARGET_KERNELS_A_LAYER,
    TARGET_KERNELS_AROUND,
    LaunchCosts,
    LaunchCounts,
)
from vllm_msd.roofline.shapes import Device, Shape
from vllm_msd.tree.config import TreeConfig

# Bytes a logit. Verification turns a half-precision logit into float32 and draws from that (2 + 4 +
# 4). A level of a tree today makes it float32, takes the log-softmax and sorts out the top k
# (2 + 4, 4 + 4, 4); in a fused kernel, and for a chain's maximum, it is read once.
SAMPLED_LOGIT = 10
RANKED_LOGIT = 18
FUSED_LOGIT = 2


@dataclass(frozen=True)
class Work:
    """What a part has to move (bytes) and compute (operations)."""

    bytes: float
    operations: float = 0.0

    def seconds(self, device: Device) -> float:
        """The longer of both."""
        return max(self.bytes / device.bandwidth, self.operations / device.flops)


@dataclass(frozen=True)
class Arm:
    """What is compared: no speculation (``drafting`` None), a chain or a tree.

    tokens: emitted by a verification and request, on average, the target's own token included.
    """

    name: str
    drafting: TreeConfig | None
    tokens: float

    @property
    def rows(self) -> int:
        """Rows of a request that the target verifies."""
        return 1 + (self.drafting.num_nodes if self.drafting else 0)


# Tokens per verification are assumptions: 4.75 is the published figure of MSD's tree on
# LLaVA-1.5-7B (MMSpec, arXiv 2603.14989), the others follow how acceptance falls with the size.
ARMS = (
    Arm("none", None, 1.0),
    Arm("chain 5", TreeConfig(5, 5, 1), 3.9),
    Arm("tree 24", TreeConfig(24, 5, 4), 4.4),
    Arm("tree 60", TreeConfig(60, 6, 10), 4.75),
)


@dataclass(frozen=True)
class Prediction:
    """A step's time. ``parts`` are seconds of the GPU by part, launches not counted.

    replayed, issued: kernels inside graphs, and those that Python starts one by one. tokens: of a
    request and step.
    """

    parts: dict[str, float]
    replayed: int
    issued: int
    costs: LaunchCosts
    tokens: float

    @property
    def bound(self) -> float:
        """Seconds without any launches: what no implementation goes below."""
        return sum(self.parts.values())

    def seconds(self, *, hidden: bool) -> float:
        """Seconds with launches.

        ``hidden``: the host issues launches ahead of the GPU, so that they cost as much as in a
        graph, unless the host takes longer for all than the GPU. Otherwise the GPU waits for each.
        A real step lies between the two.
        """
        issuing = self.issued * self.costs.eager
        if hidden:
            kernels = self.replayed + self.issued
            return max(self.bound + kernels * self.costs.graph, issuing)
        return self.bound + self.replayed * self.costs.graph + issuing

    def rate(self, seconds: float) -> float:
        """Tokens a second of one request, for steps of ``seconds``."""
        return self.tokens / seconds


def product(shape: Shape, parameters: float, rows: float) -> Work:
    """A pass of ``rows`` rows over ``parameters`` weights."""
    return Work(parameters * shape.element_bytes, 2 * parameters * rows)


def head(shape: Shape, rows: float, vocab: int) -> Work:
    """Logits of ``rows`` rows for ``vocab`` words, written out."""
    work = product(shape, vocab * shape.hidden, rows)
    return Work(work.bytes + rows * vocab * shape.element_bytes, work.operations)


def attention(shape: Shape, requests: int, rows: int, context: float) -> Work:
    """One layer's attention of ``rows`` rows a request over ``context`` earlier tokens.

    Operations are those of the tree kernel's padded tiles.
    """
    group = shape.heads // shape.kv_heads
    tile = choose_config(rows * group, group, shape.head_size, shape.element_bytes).block_m
    padded = math.ceil(rows / (tile // group)) * tile * shape.kv_heads  # (row, head) pairs
    keys = context + rows
    queries = 2 * rows * shape.heads * shape.head_size * shape.element_bytes  # and results
    return Work(
        requests * (keys * shape.kv_bytes + queries),
        4 * requests * padded * keys * shape.head_size,
    )


def verification(
    shape: Shape, device: Device, requests: int, rows: int, context: float
) -> dict[str, float]:
    """Seconds of the target's parts in a step that verifies ``rows`` rows of each request."""
    all_rows = requests * rows
    layer = product(shape, shape.layer_parameters, all_rows).seconds(device)
    attend = attention(shape, requests, rows, context).seconds(device)
    return {
        "target weights": shape.layers * layer,
        "target attention": shape.layers * attend,
        "target head": head(shape, all_rows, shape.vocab).seconds(device),
        "sampling": Work(SAMPLED_LOGIT * all_rows * shape.vocab).seconds(device),
    }


def settling(shape: Shape, device: Device, requests: int, arm: Arm, hidden_rows: int) -> float:
    """Seconds to move what a tree accepted: KV of all layers, ``hidden_rows`` hidden rows each."""
    moved = requests * (arm.tokens - 1) * shape.layers * shape.kv_bytes
    hidden = requests * hidden_rows * shape.hidden * shape.element_bytes
    return Work(2 * (moved + hidden)).seconds(device)


def draft_pass(
    shape: Shape, device: Device, rows: int, logits: int, logit_bytes: int, vocab: int
) -> float:
    """Seconds of a pass of the draft over ``rows`` rows: fc, layer and head, without attention.

    ``logits`` of the rows go through a head of ``vocab`` words; ``logit_bytes`` are moved to rank
    each of their logits.
    """
    works = (
        product(shape, shape.fc_parameters + shape.layer_parameters, rows),
        head(shape, logits, vocab),
        Work(logit_bytes * logits * vocab),
    )
    return sum(work.seconds(device) for work in works)


def predict(
    shape: Shape,
    device: Device,
    arm: Arm,
    batch: int,
    *,
    context: float = 1000,
    stage: str = "fused",
    draft_vocab: int | None = None,
    compact_prefill: bool = False,
    launches: dict[str, LaunchCounts] = LAUNCHES,
    costs: LaunchCosts = COSTS,
) -> Prediction:
    """Predict a step of ``batch`` decoding requests.

    Args:
        context: tokens of each request before the step, image tokens included.
        stage: of trees, one of `launches.STAGES`; decides their launches and what ranking moves.
        draft_vocab: rows of the draft's own head; None for the target's head.
        compact_prefill: the draft's prefill has ``depth + 1`` rows a request, the most that can be
            accepted, instead of all that were verified.
        launches: counts by kind (`launches.LAUNCHES` or `launches.read`).
        costs: seconds a launch.
    """
    parts = verification(shape, device, batch, arm.rows, context)
    replayed = TARGET_KERNELS_AROUND + shape.layers * TARGET_KERNELS_A_LAYER
    if arm.drafting is None:
        return Prediction(parts, replayed, launches["none"].outside, costs, arm.tokens)

    tree, is_tree = arm.drafting, not arm.drafting.is_chain
    counts = launches[f"tree {stage}" if is_tree else "chain"]
    rows = tree.depth + 1 if compact_prefill else arm.rows
    if is_tree:
        parts["settling"] = settling(shape, device, batch, arm, rows)
    levels = tree.depth - 1  # after the prefill, whose last row gives the first tokens
    beam = batch * tree.top_k
    logit_bytes = RANKED_LOGIT if is_tree and stage != "fused" else FUSED_LOGIT
    ranking = {"logit_bytes": logit_bytes, "vocab": draft_vocab or shape.vocab}
    parts["draft prefill"] = draft_pass(shape, device, batch * rows, batch, **ranking)
    parts["draft levels"] = levels * draft_pass(shape, device, beam, beam, **ranking)
    parts["draft attention"] = attention(shape, batch, rows, context).seconds(
        device
    ) + levels * attention(shape, batch, tree.top_k, context + arm.rows).seconds(device)
    replayed, issued = replayed + counts.prefill, counts.outside
    drafting = counts.once + levels * counts.level
    if counts.in_graph:
        replayed += drafting
    else:
        issued += drafting
    return Prediction(parts, replayed, issued, costs, arm.tokens)
