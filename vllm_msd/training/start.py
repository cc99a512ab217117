"""Starting weights that follow from what is measured on a target's first records.

The fusion layer is fitted: of all linear maps from (embedding of token j + 1, hidden state j) to
hidden state j + 1, it starts as the ridge regression on the measured rows. What the decoder layer
adds starts small beside it. Nothing is taken from any particular target: with other sizes of
embeddings, hidden states or residual stream the same draft comes out.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vllm_msd.draft import DraftRows, MSDDraft
from vllm_msd.draft.layers import DecoderLayer
from vllm_msd.training.losses import token_losses
from vllm_msd.training.units import root_mean_square

# Share of the stream that attention and MLP of the first layer add at the start.
BRANCH_SHARE = 0.1
# Ridges to choose from, in parts of the inputs' mean square. The last one all but mutes the inputs.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e4)
# How many times larger than text rows visual rows may be for copied heads, as they are ten times in
# the demo pair, which they get along with.
_LARGEST_RATIO = 16.0
# Of the measured rows, the last ones choose the ridge.
_CHOOSING, _MOST_CHOOSING = 0.25, 512


@dataclass
class Sample:
    """What was measured, in the draft's units (see `units`).

    rows: the draft's inputs for a few records. inputs: ``[N, 2H]`` (embedding, hidden state) of
    rows that count, records in order. wanted: ``[N, H]`` the hidden states they should give.
    """

    rows: DraftRows
    inputs: Tensor
    wanted: Tensor


@torch.no_grad()
def fit_fusion(draft: MSDDraft, sample: Sample, head: Tensor) -> float:
    """Fit the fusion layer to the sample; returns the ridge that was chosen.

    The ridge is the one whose fit to the first rows has the least cross-entropy on the last ones,
    so that few rows make a timid start, not a wrong one.

    Args:
        draft: changed in place.
        sample: at least 8 rows.
        head: ``[V, H]`` the target's head, in the draft's units.
    """
    fitted = len(sample.inputs) - max(1, int(_CHOOSING * len(sample.inputs)))
    inputs, wanted = sample.inputs[:fitted], sample.wanted[:fitted]
    late_inputs = sample.inputs[fitted:][:_MOST_CHOOSING]
    late_wanted = sample.wanted[fitted:][:_MOST_CHOOSING]
    with_bias = draft.fc.bias is not None
    losses = []
    for ridge, (weight, bias) in zip(
        RIDGES, _ridge_regressions(inputs, wanted, RIDGES, with_bias), strict=True
    ):
        guess = late_inputs @ weight.T + bias
        losses.append((float(token_losses(guess[None], late_wanted, head).loss.mean()), ridge))
    best = min(losses)[1]
    [(weight, bias)] = _ridge_regressions(sample.inputs, sample.wanted, (best,), with_bias)
    draft.fc.weight.copy_(weight)
    if with_bias:
        draft.fc.bias.copy_(bias)
    return best


def _ridge_regressions(
    inputs: Tensor, wanted: Tensor, ridges: tuple[float, ...], with_bias: bool
) -> list[tuple[Tensor, Tensor]]:
    """Weight ``[H, 2H]`` and bias ``[H]`` for each ridge, by the smaller of both Gram matrices."""
    mean_input, mean_wanted = inputs.mean(0), wanted.mean(0)
    if not with_bias:
        mean_input, mean_wanted = torch.zeros_like(mean_input), torch.zeros_like(mean_wanted)
    x, y = inputs - mean_input, wanted - mean_wanted
    rows, columns = x.shape
    is_wide = rows < columns
    gram = x @ x.T if is_wide else x.T @ x
    size = x.square().sum() / min(rows, columns)
    found = []
    for ridge in ridges:
        regular = gram.clone()
        regular.diagonal().add_(ridge * size + torch.finfo(x.dtype).tiny)
        factor = torch.linalg.cholesky(regular)
        if is_wide:
            weight = torch.cholesky_solve(y, factor).T @ x
        else:
            weight = torch.cholesky_solve(x.T @ y, factor).T
        found.append((weight, mean_wanted - weight @ mean_input))
    return found


@torch.no_grad()
def quiet_branches(draft: MSDDraft, sample: Sample) -> None:
    """Scale what each layer's attention and MLP add to `BRANCH_SHARE` of the stream."""
    rows = sample.rows
    stream = draft.merge_branches(rows.token_embeds, rows.hidden_states, rows.visual_mask)
    text = rows.attention_mask & ~rows.visual_mask
    size = root_mean_square(stream[text])
    added: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        added.append(output)

    for layer in map(decoder_layer, draft.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for branch, output in ((attention, attention.o_proj), (mlp, mlp.down_proj)):
            hook = branch.register_forward_hook(keep)
            draft(*rows)
            hook.remove()
            now = root_mean_square(added.pop()[text])
            if now > 0:
                output.weight *= BRANCH_SHARE * size / now


@torch.no_grad()
def open_heads_for_images(draft: MSDDraft, sample: Sample) -> None:
    """Start the last half of the first layer's key heads anew, for visual rows as large as these.

    Visual rows enter raw and, without an input norm, often many times larger than text rows. With
    copied weights their attention logits are huge, the first steps shut them out, and a soft-max
    that gives them nothing never lets them back in. The query heads of a group go with their key
    head. The heads that stay copied see less of rows that are larger still.
    """
    config = draft.config
    ratio = _visual_ratio(sample.rows)
    attention = decoder_layer(draft.layers[0]).self_attn
    kept = config.num_key_value_heads - config.num_key_value_heads // 2
    keys = kept * config.head_dim
    queries = keys * config.num_attention_heads // config.num_key_value_heads
    std = config.hidden_size**-0.5
    for projection in (attention.k_proj, attention.v_proj):
        projection.weight[:keys] /= max(1.0, ratio / _LARGEST_RATIO)
    attention.q_proj.weight[queries:].normal_(0.0, std)
    attention.k_proj.weight[keys:].normal_(0.0, std / ratio)
    attention.v_proj.weight[keys:].normal_(0.0, std / ratio)
    attention.o_proj.weight[:, queries:].normal_(0.0, std)


def parameter_groups(draft: MSDDraft, sample: Sample) -> list[dict[str, Any]]:
    """The optimizer's groups, each with the ``factor`` that its learning rate is multiplied by.

    Keys and values of a first layer without input norm read visual rows as they are. A step moves
    what they make of these by the rate times the rows' size, so the rate goes down with it.
    """
    ratio = 1.0 if draft.config.input_norm else _visual_ratio(sample.rows)
    attention = decoder_layer(draft.layers[0]).self_attn
    reading = [attention.k_proj.weight, attention.v_proj.weight]
    others = [p for p in draft.parameters() if all(p is not r for r in reading)]
    return [{"params": others, "factor": 1.0}, {"params": reading, "factor": 1 / ratio}]


def _visual_ratio(rows: DraftRows) -> float:
    """How many times larger than 1, the size of text rows, visual rows are; at least 1."""
    visual = rows.visual_mask & rows.attention_mask
    return max(1.0, root_mean_square(rows.token_embeds[visual]))


def decoder_layer(module: nn.Module) -> DecoderLayer:
    """An entry of `MSDDraft.layers`, which is a list of modules to a type checker."""
    return cast(DecoderLayer, module)
