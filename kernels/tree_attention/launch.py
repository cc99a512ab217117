"""How the Triton kernels are launched: tile sizes, splits, workspace. Host integers only."""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
MAX_SPLITS = 32
MIN_SPLIT_KEYS = 256  # below this a program costs more to start and merge than it saves


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes of one launch.

    block_m: query rows (token, head of the group) per program, a power of two >= 16.
    tile: keys per step, a power of two >= 16.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int

    @property
    def programs_per_sm(self) -> int:
        """How many fit on a multiprocessor at once, by their registers and shared memory."""
        return 2 if self.num_warps == 4 else 1

    def __post_init__(self) -> None:
        for name in ("block_m", "tile"):
            value = getattr(self, name)
            if value < 16 or value != power_of_two(value):
                raise ValueError(f"{name} is {value}: expected a power of two, at least 16")


@cache
def choose_config(
    rows: int, group: int, head_size: int, itemsize: int, hopper: bool = True
) -> LaunchConfig:
    """Tiles for requests of at most ``rows`` (token, head) rows per KV head.

    ``itemsize`` is the size of an element of q in bytes, ``hopper`` whether the device has sm_90's
    (or sm_100's) shared memory and matrix instructions, which want larger tiles. The rule: as many
    rows as a request has, so that its keys are read once, as far as registers allow.
    ``benchmarks/compile_check.py`` shows that none of these spill.
    """
    wide = power_of_two(head_size) > 128
    widest = 16 if itemsize == 4 else 64 if wide and not hopper else 128
    block_m = max(16, power_of_two(group), min(power_of_two(rows), widest))
    small_tile = wide or (block_m >= 64 and not hopper)
    eight_warps = block_m >= 128 or (wide and (block_m >= 64 or not hopper))
    if itemsize == 4:
        eight_warps = hopper  # on sm_80 the assembler spills with eight
    return LaunchConfig(
        block_m=block_m,
        tile=16 if itemsize == 4 else 32 if small_tile else 64,
        num_warps=8 if eight_warps else 4,
        # Keys are found through the block table, so Triton spends every other stage on the table:
        # five stages keep two tiles of keys and values in flight.
        num_stages=3 if itemsize == 4 or (wide and not hopper) else 5,
    )


@lru_cache(maxsize=64)  # every layer of a step asks for the same
def choose_num_splits(programs: int, max_keys: int, slots: int) -> int:
    """Into how many parts to split the context so that ``programs`` programs fill ``slots``.

    Takes the smallest number that keeps the last wave of programs nearly as full as the best
    number would. ``max_keys`` bounds the sequence length; parts shorter than a few tiles are not
    worth their start, and from two waves on the programs even out by themselves.
    """
    if programs >= 2 * slots:
        return 1
    candidates = range(1, max(1, min(MAX_SPLITS, max_keys // MIN_SPLIT_KEYS)) + 1)
    filled = [programs * n / slots / math.ceil(programs * n / slots) for n in candidates]
    return next(n for n, f in zip(candidates, filled, strict=True) if f >= 0.9 * max(filled))


def choices(
    group: int, head_size: int, itemsize: int, max_query_len: int, max_seq_len: int, hopper: bool
) -> list[tuple[LaunchConfig, int]]:
    """Tiles and splits that together compile every variant a launch can pick; see `variants`.

    Args:
        group, head_size, itemsize, hopper: as for `choose_config`; fixed in an engine.
        max_query_len, max_seq_len: the largest that are ever given.
    """
    lengths = [*(1 << n for n in range(max_query_len.bit_length())), max_query_len]
    configs = list(
        dict.fromkeys(choose_config(n * group, group, head_size, itemsize, hopper) for n in lengths)
    )
    most = max(1, min(MAX_SPLITS, max_seq_len // MIN_SPLIT_KEYS))
    # Split or not is a variant of the attention, the padded number of splits one of the merge.
    splits = sorted({min(power_of_two(n), most) for n in range(1, most + 1)})
    return [
        *((config, n) for config in configs for n in splits[:2]),
        *((configs[0], n) for n in splits[2:]),
    ]


@dataclass(frozen=True)
class TreeAttentionWorkspace:
    """Buffers that a split launch needs, allocated once and reused by every layer and step.

    A larger batch is split less often, and where nothing fits it is not split at all.

    partial: float32 [num_tokens * num_heads * num_splits * head_size]
    partial_lse: float32 [num_tokens * num_heads * num_splits]
    """

    partial: Tensor
    partial_lse: Tensor

    @classmethod
    def allocate(
        cls,
        num_tokens: int,
        num_heads: int,
        head_size: int,
        num_splits: int = MAX_SPLITS,
        device: torch.device | str = "cuda",
    ) -> "TreeAttentionWorkspace":
        cells = num_tokens * num_heads * num_splits
        return cls(
            partial=torch.empty(cells * head_size, dtype=torch.float32, device=device),
            partial_lse=torch.empty(cells, dtype=torch.float32, device=device),
        )

    def max_splits(self, num_tokens: int, num_heads: int, head_size: int) -> int:
        """Splits of such a batch that fit, possibly 0."""
        cells = min(self.partial_lse.numel(), self.partial.numel() // head_size)
        return cells // (num_tokens * num_heads)


@cache
def _device(device: torch.device) -> tuple[int, tuple[int, int]]:
    """(multiprocessors, compute capability); Triton's interpreter counts as one small sm_90."""
    if device.type != "cuda":
        return 1, (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def is_hopper(device: torch.device) -> bool:
    """Whether it has the shared memory and the matrix instructions of sm_90 (or sm_100)."""
    return _device(device)[1][0] in (9, 10)


def launch_tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    tree_start: Tensor | None,
    ancestors: Tensor | None,
    scale: float,
    *,
    out: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    max_query_len: int | None,
    max_seq_len: int | None,
    num_splits: int | None,
    workspace: TreeAttentionWorkspace | None,
    config: LaunchConfig | None,
) -> Tensor:
    """Launch the kernels on arguments that ``tree_attention`` has checked. Reads no tensor."""
    from .triton_kernel import merge_splits_kernel, tree_attention_kernel

    num_tokens, num_heads, head_size = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_requests = seq_lens.shape[0]
    group = num_heads // num_kv_heads
    max_query_len = num_tokens if max_query_len is None else max_query_len
    num_sms, capability = _device(q.device)
    if k_cache.dtype == torch.float8_e4m3fn and capability < (8, 9):
        raise ValueError(
            f"a float8_e4m3fn cache needs compute capability 8.9, {q.device} has "
            f"{capability[0]}.{capability[1]}: use float8_e5m2 or {q.dtype}"
        )
    hopper = is_hopper(q.device)
    if config is None:
        config = choose_config(max_query_len * group, group, head_size, q.element_size(), hopper)
    block_q = config.block_m // group

    fitting = MAX_SPLITS if workspace is None else workspace.max_splits(*q.shape)
    if num_splits is None:
        capacity = block_table.shape[1] * block_size
        num_splits = choose_num_splits(
            # At least this many programs find work; the grid below also counts the empty ones.
            programs=max(num_requests, math.ceil(num_tokens / block_q)) * num_kv_heads,
            max_keys=capacity if max_seq_len is None else max_seq_len,
            slots=num_sms * config.programs_per_sm,
        )
        num_splits = max(1, min(num_splits, fitting))
    if num_splits > 1 and workspace is None:
        workspace = TreeAttentionWorkspace.allocate(
            num_tokens, num_heads, head_size, num_splits, q.device
        )
    elif num_splits > max(1, fitting):
        raise ValueError(
            f"the workspace holds {fitting} splits of {num_tokens} tokens and {num_heads} heads, "
            f"num_splits is {num_splits}: allocate it for the largest batch"
        )

    partial = partial_lse = None
    if workspace is not None and num_splits > 1:
        partial, partial_lse = workspace.partial, workspace.partial_lse
    shape = {"HEAD_SIZE": head_size, "BLOCK_D": power_of_two(head_size)}
    # sum over requests of ceil(len / block_q) is at most this, whatever the lengths are.
    q_blocks = num_tokens // block_q + num_requests
    tree_attention_kernel[(q_blocks, num_kv_heads, num_splits)](
        out,
        partial,
        partial_lse,
        q,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        query_start,
        tree_start,
        ancestors,
        k_scale,
        v_scale,
        num_requests,
        num_splits,
        scale * LOG2E,
        block_table.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *out.stride()[:2],
        GROUP=group,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        TILE=config.tile,
        SPLIT=num_splits > 1,
        HAS_TREE=tree_start is not None,
        STAGES=config.num_stages,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        **shape,
    )
    if num_splits > 1:
        merge_splits_kernel[(num_tokens, num_heads)](
            out,
            partial,
            partial_lse,
            query_start,
            num_requests,
            num_splits,
            *out.stride()[:2],
            SPLITS_PADDED=power_of_two(num_splits),
            num_warps=4,
            **shape,
        )
    return out
