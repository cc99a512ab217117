"""Compile the kernels for sm_80 and sm_90 and record what the code needs; no GPU.

Triton's wheel brings NVIDIA's assembler, so real machine code can be made and looked at anywhere:
registers per thread, spilled bytes, shared memory per block. Exits with 1 if a kernel spills or
does not fit. What this cannot say is how fast the code runs, or that it is right on a device.

    python benchmarks/compile_check.py [--quick] [--out benchmarks/results/FILE.json]
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

# The interpreter must be off when the kernels are imported, or there is nothing to compile.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_msd.kernels.accept.triton_kernel import accept_kernel
from vllm_msd.kernels.beam_step.api import TILE as BEAM_TILE
from vllm_msd.kernels.beam_step.triton_kernel import beam_step_kernel
from vllm_msd.kernels.draft_prefill.api import PROGRAM_VALUES
from vllm_msd.kernels.draft_prefill.triton_kernel import draft_prefill_kernel
from vllm_msd.kernels.place_trees.api import ROWS as PLACED_ROWS
from vllm_msd.kernels.place_trees.triton_kernel import place_trees_kernel
from vllm_msd.kernels.rerank.triton_kernel import rerank_kernel
from vllm_msd.kernels.settle.api import PROGRAM_BYTES
from vllm_msd.kernels.settle.triton_kernel import settle_kernel
from vllm_msd.kernels.top_k.api import GROUP_COLUMNS, PART_COLUMNS
from vllm_msd.kernels.top_k.triton_kernel import merge_top_k_kernel, top_k_parts_kernel
from vllm_msd.kernels.tree_attention.launch import LaunchConfig, choose_config, power_of_two
from vllm_msd.kernels.tree_attention.triton_kernel import (
    merge_splits_kernel,
    tree_attention_kernel,
)

# Bytes a block can have: 163 KiB on sm_80 itself, but sm_86, 89 and 120 run the same tiles with 99.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
# Width, levels below the first and logits: the documentation's trees, the widest, a chain.
GROWTHS = [(4, 4, "bf16"), (10, 5, "fp16"), (16, 4, "bf16"), (16, 4, "fp32"), (1, 7, "bf16")]
POINTERS = ("out", "partial", "partial_lse", "q", "k", "v", "block_table", "seq_lens")
POINTERS += ("query_start", "tree_start", "ancestors", "k_scale", "v_scale")


@dataclass(frozen=True)
class Case:
    """One variant of the attention kernel: rows are (token, head) rows per request and KV head."""

    arch: int
    head_size: int
    rows: int
    group: int = 1
    q: str = "bf16"
    cache: str = "bf16"
    split: bool = True
    tree: bool = True
    block_size: int = 16


def all_cases() -> list[Case]:
    """Every head size at the tiles the launcher picks for decoding, trees and prefill."""
    cases = []
    for arch in (80, 90):
        for head_size in (64, 80, 96, 128, 256):
            cases += [Case(arch, head_size, rows) for rows in (1, 64, 512)]
        cases += [
            Case(arch, 128, 20),
            Case(arch, 256, 20),
            Case(arch, 128, 427, group=7),  # Qwen2-VL-7B: 61 tokens, 28 heads over 4
            Case(arch, 128, 512, split=False),
            Case(arch, 128, 64, tree=False),
            Case(arch, 128, 64, q="fp16", cache="fp16"),
            Case(arch, 128, 64, q="fp32", cache="fp32"),
            Case(arch, 256, 64, q="fp32", cache="fp32"),
            # Blocks that are no power of two want a division.
            *(Case(arch, h, rows, block_size=48) for h in (128, 256) for rows in (64, 512)),
        ]
    # e4m3 conversions exist from sm_89 on.
    cases += [Case(90, h, rows, cache="fp8e4nv") for h in (64, 128, 256) for rows in (1, 64, 512)]
    cases += [Case(90, h, 64, cache="fp8e4nv") for h in (80, 96)]
    cases += [Case(90, 128, 64, q="fp16", cache="fp8e4nv")]
    cases += [Case(90, 128, 427, group=7, cache="fp8e4nv")]
    cases += [Case(90, 128, 64, cache="fp8e4nv", block_size=48)]
    cases += [Case(arch, 128, 64, cache="fp8e5") for arch in (80, 90)]
    return cases


def quick_cases() -> list[Case]:
    """A few that stand for the rest: the main shape on both targets and the largest head."""
    return [Case(80, 128, 64), Case(90, 128, 64), Case(90, 256, 512), Case(80, 256, 64)]


def compile_attention(case: Case) -> tuple[dict, LaunchConfig]:
    """Compile one variant, with the argument alignment that serving has."""
    config = choose_config(
        case.rows, case.group, case.head_size, ITEMSIZE[case.q], hopper=case.arch == 90
    )
    constants = {
        "GROUP": case.group,
        "HEAD_SIZE": case.head_size,
        "BLOCK_D": power_of_two(case.head_size),
        "BLOCK_SIZE": case.block_size,
        "BLOCK_M": config.block_m,
        "TILE": config.tile,
        "SPLIT": case.split,
        "HAS_TREE": case.tree,
        "STAGES": config.num_stages,
        "PRECISION": "ieee" if case.q == "fp32" else "tf32",
    }
    types = dict.fromkeys(("partial", "partial_lse", "k_scale", "v_scale"), "fp32")
    types |= {"out": case.q, "q": case.q, "k": case.cache, "v": case.cache, "ancestors": "i64"}
    unused = () if case.split else ("partial", "partial_lse")
    unused += () if case.tree else ("tree_start", "ancestors")
    unused += () if case.cache.startswith("fp8") else ("k_scale", "v_scale")
    constants |= {f"{name}_ptr": None for name in unused}
    signature = {}
    for name in tree_attention_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{types.get(name.removesuffix('_ptr'), 'i32')}"
        else:
            signature[name] = "fp32" if name == "score_scale" else "i32"
    return build(tree_attention_kernel, signature, constants, case.arch, config), config


def compile_merge(arch: int, head_size: int, splits: int) -> dict:
    constants = {
        "HEAD_SIZE": head_size,
        "BLOCK_D": power_of_two(head_size),
        "SPLITS_PADDED": power_of_two(splits),
    }
    signature = {"out_ptr": "*bf16", "partial_ptr": "*fp32", "partial_lse_ptr": "*fp32"}
    signature |= {"query_start_ptr": "*i32", "num_requests": "i32", "num_splits": "i32"}
    signature |= {"stride_ot": "i32", "stride_oh": "i32"} | dict.fromkeys(constants, "constexpr")
    return build(merge_splits_kernel, signature, constants, arch, LaunchConfig(16, 16, 4, 1))


def compile_settle(arch: int, row_words: int, word: str = "i64") -> dict:
    """Rows of ``row_words`` words a head; 16-byte aligned, as vLLM's caches are."""
    size = int(word[1:]) // 8
    constants = {
        "WIDTH": row_words,
        "BLOCK_SIZE": 16,
        "COLUMNS": PROGRAM_BYTES // size,
        "NODES": 64,
        "ALIGN": max(1, 16 // size),
    }
    signature = {
        name: f"*{word}"
        if name == "words_ptr"
        else "*i64"
        if name in ("offsets_ptr", "nodes_ptr")
        else "*i32"
        if name.endswith("_ptr")
        else "constexpr"
        if name in constants
        else "i32"
        for name in settle_kernel.arg_names
    }
    return build(settle_kernel, signature, constants, arch, LaunchConfig(16, 16, 4, 1))


def compile_accept(arch: int) -> dict:
    integers = {"tokens_ptr": "*i32", "row_start_ptr": "*i32", "NODES": "constexpr"}
    signature = {
        name: integers.get(name, "*i64" if name.endswith("_ptr") else "i32")
        for name in accept_kernel.arg_names
    }
    return build(accept_kernel, signature, {"NODES": 64}, arch, LaunchConfig(16, 16, 1, 1))


def compile_small(
    kernel: triton.JITFunction, arch: int, types: dict[str, str], constants: dict
) -> dict:
    """A kernel whose pointers are int32 unless ``types`` says something else."""
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return build(kernel, signature, constants, arch, LaunchConfig(16, 16, 4, 1))


def compile_growth(arch: int, k: int, depth: int, logits: str = "bf16") -> dict[str, dict]:
    """The launches that grow a tree, a vocabulary of 152k, ``depth`` levels below the first."""
    slots, candidates = power_of_two(k), k + depth * k * k
    parts_types = {"parts_ptr": "*i64", "logits_ptr": f"*{logits}"}
    parts = {"K": k, "GROUPS": PART_COLUMNS // GROUP_COLUMNS, "WIDTH": GROUP_COLUMNS}
    entries = power_of_two(-(-152064 // PART_COLUMNS) * (k + 1))
    merge = {"K": k, "SLOTS": slots, "ENTRIES": entries, "HAS_MAP": True}
    beam = {"K": k, "IS_ROOT": False, "SLOTS": slots, "CHILDREN": power_of_two(k * k)}
    beam |= {"BLOCK_SIZE": 16, "COLUMNS": BEAM_TILE // slots, "IS_LAST": False}
    beam_types = dict.fromkeys(("ancestors_ptr", "positions_ptr", "kv_slots_ptr"), "*i64")
    beam_types |= dict.fromkeys(("first_ptr", "slots_ptr"), "*i64")
    beam_types |= dict.fromkeys(("log_probs_ptr", "scores_ptr"), "*fp32")
    beam_types |= dict.fromkeys(("hidden_ptr", "parent_hidden_ptr"), f"*{logits}")
    rerank = {"K": k, "CANDIDATES": power_of_two(candidates), "NODES": 64}
    rerank["JUMPS"] = depth.bit_length()
    rerank_types = {"scores_ptr": "*fp32", "slots_ptr": "*i64"}
    for name in ("parents", "depths", "ancestors", "draft_tokens"):
        rerank_types[f"{name}_ptr"] = "*i64"
    return {
        "top_k_parts": compile_small(top_k_parts_kernel, arch, parts_types, parts),
        "merge_top_k": compile_small(
            merge_top_k_kernel, arch, {"log_probs_ptr": "*fp32", "parts_ptr": "*i64"}, merge
        ),
        "beam_step": compile_small(beam_step_kernel, arch, beam_types, beam),
        "rerank": compile_small(rerank_kernel, arch, rerank_types, rerank),
    }


def compile_placing(arch: int, dims: int) -> dict:
    names = ("root_rows", "row_ancestors", "positions", "shifts", "linear", "depths", "ancestors")
    names += ("slots",)
    types = {f"{name}_ptr": "*i64" for name in names}
    return compile_small(place_trees_kernel, arch, types, {"DIMS": dims, "ROWS": PLACED_ROWS})


def compile_prefill(arch: int, width: int) -> dict:
    names = ("positions", "kv_slots", "last_rows", "out_slots", "nodes", "root_rows", "slots")
    types = {f"{name}_ptr": "*i64" for name in (*names, "emitted")}
    types |= {"out_ptr": "*bf16", "hidden_ptr": "*bf16"}
    rows = power_of_two(width)
    sizes = {"BLOCK_SIZE": 16, "WIDTH": rows, "COLUMNS": PROGRAM_VALUES // rows}
    return compile_small(draft_prefill_kernel, arch, types, sizes)


def build(
    kernel: triton.JITFunction, signature: dict, constants: dict, arch: int, config: LaunchConfig
) -> dict:
    """Compile and measure: registers per thread, spilled bytes, shared memory per block."""
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name.endswith("_ptr") or name.startswith("stride_") or name == "num_columns"
        if name not in constants
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.num_warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack) + int(local),  # the kernels have no arrays of their own
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": "wgmma" if "wgmma." in ptx else "mma" if "mma.sync" in ptx else "none",
        "async_copies": ptx.count("cp.async.c"),
        "wide_accesses": len(re.findall(r"(?:ld|st)\.global\S*\.v(?:2\.b64|4\.b32)", ptx)),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases instead of all")
    parser.add_argument("--out", type=Path, help="where to write the JSON record")
    args = parser.parse_args(argv)

    rows, bad = [], 0
    for case in quick_cases() if args.quick else all_cases():
        figures, config = compile_attention(case)
        rows.append({"kernel": "attention", **asdict(case), **asdict(config), **figures})
    for arch in (80, 90):
        for head_size in (128,) if args.quick else (64, 80, 96, 128, 256):
            figures = compile_merge(arch, head_size, 32)
            rows.append({"kernel": "merge", "arch": arch, "head_size": head_size, **figures})
    for arch in (80, 90):
        # Head sizes 128 and 80 in half types, and rows no wide word divides.
        for row_words, word in ((64, "i64"), (40, "i64"), (3, "i8"))[: 1 if args.quick else None]:
            figures = compile_settle(arch, row_words, word)
            rows.append({"kernel": "settle", "arch": arch, "row": f"{row_words} {word}", **figures})
        rows.append({"kernel": "accept", "arch": arch, **compile_accept(arch)})
        for dims in (1, 3):
            figures = compile_placing(arch, dims)
            rows.append({"kernel": "place_trees", "arch": arch, "dims": dims, **figures})
        for width in (6, 64):
            figures = compile_prefill(arch, width)
            rows.append({"kernel": "draft_prefill", "arch": arch, "width": width, **figures})
    for arch in (80, 90):
        for k, depth, logits in GROWTHS[: 1 if args.quick else None]:
            for name, figures in compile_growth(arch, k, depth, logits).items():
                rows.append(
                    {"kernel": name, "arch": arch, "k": k, "depth": depth, "logits": logits}
                    | figures
                )
    for row in rows:
        row["fits"] = not row["spilled_bytes"] and row["shared_bytes"] <= SHARED_LIMIT[row["arch"]]
        bad += not row["fits"]
        print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)

    record = {
        "what": "compiled, not run: registers per thread, spilled bytes, shared bytes per block",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "triton": triton.__version__,
        "shared_limit_bytes": {f"sm_{arch}": limit for arch, limit in SHARED_LIMIT.items()},
        "kernels": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(rows)} kernels, {bad} that spill or do not fit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
