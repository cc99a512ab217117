"""The cost table of a GPU by arithmetic, for the budget rule (`vllm_msd.budget`)."""

from vllm_msd.budget import CostTable
from vllm_msd.roofline.launches import (
    COSTS,
    LAUNCHES,
    TARGET_KERNELS_A_LAYER,
    TARGET_KERNELS_AROUND,
    LaunchCosts,
)
from vllm_msd.roofline.shapes import Device, Shape
from vllm_msd.roofline.step import (
    ARMS,
    FUSED_LOGIT,
    Prediction,
    attention,
    draft_pass,
    predict,
    verification,
)
from vllm_msd.tree.config import TreeConfig

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Nodes of a request; between them costs are taken as linear.
NODES = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 40, 60)


def gpu_costs(
    shape: Shape,
    device: Device,
    tree: TreeConfig,
    *,
    context: float = 1000,
    hidden: bool = False,
    launch_costs: LaunchCosts = COSTS,
) -> CostTable:
    """Costs of drafting and verifying such trees with fused kernels in one graph.

    A step without nodes is one without speculation.

    Args:
        shape, device: the target's language model and the GPU.
        tree: the largest tree.
        context: tokens of each request.
        hidden: whether launches hide behind the GPU's work; see `Prediction.seconds`.
        launch_costs: seconds a launch.
    """
    counts = LAUNCHES["chain" if tree.is_chain else "tree fused"]
    kernels = TARGET_KERNELS_AROUND + shape.layers * TARGET_KERNELS_A_LAYER
    ranking = {"logit_bytes": FUSED_LOGIT, "vocab": shape.vocab}
    step, prefill, level = [], [], []
    for requests in BATCHES:
        none = predict(shape, device, ARMS[0], requests, context=context, costs=launch_costs)
        step.append((requests, requests, none.seconds(hidden=hidden)))
        for nodes in (n for n in NODES if n <= tree.num_nodes):
            parts = verification(shape, device, requests, 1 + nodes, context)
            outside = Prediction(parts, kernels, counts.outside, launch_costs, 1.0)
            rows = requests * (1 + nodes)
            step.append((requests, rows, outside.seconds(hidden=hidden)))
            read = draft_pass(shape, device, rows, requests, **ranking)
            read += attention(shape, requests, 1 + nodes, context).seconds(device)
            prefill.append((rows, read + launch_costs.graph * (counts.prefill + counts.once)))
        beam = requests * tree.top_k
        grow = draft_pass(shape, device, beam, beam, **ranking)
        grow += attention(shape, requests, tree.top_k, context).seconds(device)
        level.append((requests, grow + launch_costs.graph * counts.level))
    return CostTable(tuple(step), tuple(prefill), tuple(level))
