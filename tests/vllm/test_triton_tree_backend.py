"""The tree backend for GPUs on CPU tensors, vLLM's kernels and ours in Triton's interpreter.

What could go wrong between a right kernel and vLLM: keys and values taken from the wrong half of
its cache or with wrong strides, padding of CUDA graphs, a draft layer that follows the target's
trees, another result than the parent's where there are none, a layer whose attention the kernel
does not compute. The cache is allocated and written by vLLM's own code; expected values are those
of every root-to-leaf path unrolled (float32, hence 1e-5).

Not covered: CUDA graphs, and compiled code.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.common.attention_layers import (
    HEADS,
    KV_HEADS,
    common_metadata,
    make_builder,
    make_layer,
    make_metadata,
    rows_of,
    run,
    tree_and_chain_configs,
    write_cache,
)
from tests.common.tree_batches import Request, chain, make_batch, unrolled_attention
from tests.common.worker import INTERPRETER
from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.trees.attention import ATTRIBUTE

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process of its own with TRITON_INTERPRET=1"
)
TREE = [-1, 0, 0, 1, 1, 2, 2]
MIXED = [
    Request(40, TREE),  # verification
    Request(25),  # ordinary decoding
    Request(18, TREE, queries=4),  # a draft level
    Request(33, TREE, queries=12),  # the rest of a prompt in front of a tree
    Request(0, TREE),
]
CAUSAL = [Request(21, queries=9), Request(6), Request(33, queries=2)]


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter's process")
def test_in_the_interpreter(fresh_process):
    environment = fresh_process["env"]
    path = [str(INTERPRETER), str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=ROOT,
        env={**environment, **settings, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        preexec_fn=fresh_process["preexec_fn"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    """vLLM's launcher of the cache update picks its tile by the device's generation."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return tree_and_chain_configs(tmp_path_factory.mktemp("pair"))


@interpreted
@pytest.mark.parametrize(
    ("layout", "block_size"), [("LBHNC", 16), ("LBNHC", 48), ("BLHNC", 16), ("BLNHC", 32)]
)
def test_trees_over_vllms_cache(configs, layout, block_size):
    layer = make_layer(configs["trees"])
    batch = make_batch(MIXED, heads=HEADS, kv_heads=KV_HEADS, block_size=block_size)
    cache = write_cache(layer, batch, layout, block_size)
    output = run(layer, batch, cache, make_metadata(batch, tree=rows_of(batch)))
    torch.testing.assert_close(output.double(), unrolled_attention(batch), rtol=0, atol=1e-5)


@interpreted
def test_a_batch_padded_for_cuda_graphs(configs):
    """The tree buffers are longer than the batch, and the batch has empty requests and rows."""
    layer = make_layer(configs["trees"])
    batch = make_batch(MIXED, heads=HEADS, kv_heads=KV_HEADS)
    cache = write_cache(layer, batch, "LBHNC")
    output = run(layer, batch, cache, make_metadata(batch, 9, 3, rows_of(batch, spare=20)))
    rows = len(batch.args[0])
    torch.testing.assert_close(output[:rows].double(), unrolled_attention(batch), rtol=0, atol=1e-5)
    assert (output[rows:] == 7).all()


@interpreted
@pytest.mark.parametrize("engine", ["trees", "chains"])
def test_without_trees_it_is_the_parent(configs, engine):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    layer, parent = make_layer(configs[engine]), make_layer(configs[engine], TritonAttentionBackend)
    batch = make_batch(CAUSAL, heads=HEADS, kv_heads=KV_HEADS)
    cache = write_cache(layer, batch, "LBHNC")
    metadata = make_metadata(batch)
    expected = run(parent, batch, cache, metadata)
    assert torch.equal(run(layer, batch, cache, metadata), expected)
    setattr(metadata, ATTRIBUTE, None)
    assert torch.equal(run(layer, batch, cache, metadata), expected)
    torch.testing.assert_close(expected.double(), unrolled_attention(batch), rtol=0, atol=1e-5)


@interpreted
def test_requests_without_drafts_take_the_parents_way(configs, monkeypatch):
    """Trees, one of them behind prompt rows, then a decoding request and a chunk of a prompt."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    from vllm_msd.vllm_plugin.gpu import attention
    from vllm_msd.vllm_plugin.gpu.split import Split
    from vllm_msd.vllm_plugin.gpu.triton_backend import TreeTritonAttentionBackend

    config = configs["trees"]
    layer = make_layer(config)
    requests = [Request(40, TREE), Request(33, TREE, queries=12), Request(25), *CAUSAL[:1]]
    batch = make_batch(requests, heads=HEADS, kv_heads=KV_HEADS)
    cache = write_cache(layer, batch, "LBHNC")
    builder = make_builder(config, TreeTritonAttentionBackend)
    with_drafts = Split(2, len(TREE) + 12, 12)

    asked = {"kernel": [], "parent": []}
    kernel, parent = attention.tree_attention, TritonAttentionImpl.forward

    def watched_kernel(q, *args, **kwargs):
        asked["kernel"].append(len(q))
        return kernel(q, *args, **kwargs)

    def watched_parent(self, layer, query, *args):
        asked["parent"].append(len(query))
        return parent(self, layer, query, *args)

    monkeypatch.setattr(attention, "tree_attention", watched_kernel)
    monkeypatch.setattr(TritonAttentionImpl, "forward", watched_parent)
    metadata = builder.build(0, common_metadata(batch), split=with_drafts)
    setattr(metadata, ATTRIBUTE, rows_of(batch))
    parted = run(layer, batch, cache, metadata)
    assert asked == {"kernel": [19], "parent": [10]}
    torch.testing.assert_close(parted.double(), unrolled_attention(batch), rtol=0, atol=1e-5)

    whole = builder.build(0, common_metadata(batch))
    setattr(whole, ATTRIBUTE, rows_of(batch))
    unparted = run(layer, batch, cache, whole)
    assert asked == {"kernel": [19, 29], "parent": [10]}
    torch.testing.assert_close(parted, unparted, rtol=0, atol=1e-5)

    # The draft's prefill shares the metadata, and takes all rows to the parent.
    layer.is_draft_layer = True
    causal = run(layer, batch, cache, metadata)
    assert asked == {"kernel": [19, 29], "parent": [10, 29]}
    assert (causal - parted)[:19].abs().max() > 0.1
    torch.testing.assert_close(causal[19:], parted[19:], rtol=0, atol=1e-5)


@interpreted
def test_a_draft_layer_follows_its_own_trees_only(configs):
    layer = make_layer(configs["trees"])
    batch = make_batch(MIXED, heads=HEADS, kv_heads=KV_HEADS)
    cache = write_cache(layer, batch, "LBHNC")
    causal = run(layer, batch, cache, make_metadata(batch))
    trees = unrolled_attention(batch)
    layer.is_draft_layer = True
    shared = run(layer, batch, cache, make_metadata(batch, tree=rows_of(batch)))
    assert torch.equal(shared, causal)
    own = run(layer, batch, cache, make_metadata(batch, tree=rows_of(batch, is_draft=True)))
    torch.testing.assert_close(own.double(), trees, rtol=0, atol=1e-5)
    assert (own - causal).abs().max() > 0.1


@interpreted
def test_a_chain_is_causal(configs):
    layer = make_layer(configs["trees"])
    batch = make_batch(
        [Request(30, chain(9)), Request(2, chain(3))], heads=HEADS, kv_heads=KV_HEADS
    )
    cache = write_cache(layer, batch, "LBNHC")
    causal = run(layer, batch, cache, make_metadata(batch))
    chains = run(layer, batch, cache, make_metadata(batch, tree=rows_of(batch)))
    torch.testing.assert_close(chains, causal, rtol=0, atol=1e-5)


@interpreted
def test_a_float8_cache_comes_as_bytes(configs):
    """vLLM's own writing needs a GPU here, so the bytes are laid out as it would."""
    from vllm_msd.kernels.tree_attention.eager import tree_attention_eager

    config = configs["trees"]
    config.cache_config.cache_dtype = "fp8"
    try:
        layer = make_layer(config, cache_config=config.cache_config)
    finally:
        config.cache_config.cache_dtype = "auto"
    assert layer.query_quant is None, "queries would come as float8"
    layer._k_scale.fill_(0.7)
    layer._v_scale.fill_(1.9)
    batch = make_batch(MIXED, heads=HEADS, kv_heads=KV_HEADS, cache_dtype=torch.float8_e4m3fn)
    packed = torch.cat([t.view(torch.uint8) for t in batch.args[1:3]], -1).transpose(1, 2)
    output = run(layer, batch, packed.contiguous(), make_metadata(batch, tree=rows_of(batch)))
    expected = tree_attention_eager(*batch.args, k_scale=layer._k_scale, v_scale=layer._v_scale)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_size": 72}, "head size 72"),
        ({"per_layer_sliding_window": 64}, "a sliding window"),
        ({"alibi_slopes": [0.1] * HEADS}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap"),
        ({"sinks": torch.zeros(HEADS)}, "attention sinks"),
        ({"chunk_lookback": 1, "logits_soft_cap": 30.0}, "chunked attention, nor a soft cap"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(configs, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_layer(configs["trees"], **arguments)
    make_layer(configs["chains"], **arguments)  # no trees, no demands


@interpreted
def test_a_cache_of_another_half_type_is_refused(configs):
    config = configs["trees"]
    config.cache_config.cache_dtype = "bfloat16"
    try:
        with pytest.raises(ConfigError, match=r"kv_cache_dtype 'bfloat16' with torch\.float32"):
            make_layer(config, cache_config=config.cache_config)
    finally:
        config.cache_config.cache_dtype = "auto"


@interpreted
def test_trees_nobody_announced_are_refused(configs):
    layer = make_layer(configs["chains"])
    batch = make_batch(MIXED, heads=HEADS, kv_heads=KV_HEADS)
    metadata = make_metadata(batch, tree=rows_of(batch))
    with pytest.raises(RuntimeError, match="drafts none"):
        run(layer, batch, torch.empty(0), metadata)


@interpreted
def test_layers_with_another_backend_are_refused(configs):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from vllm_msd.vllm_plugin.gpu.attention import check_backend

    check_backend([make_layer(configs["trees"])])
    with pytest.raises(ConfigError, match="got TRITON_ATTN, but draft trees"):
        check_backend([make_layer(configs["trees"], TritonAttentionBackend)])


def test_it_replaces_methods_that_vllm_has():
    from vllm_msd.vllm_plugin.gpu.triton_backend import TreeTritonAttentionImpl
    from vllm_msd.vllm_plugin.patches.overrides import check_overrides

    check_overrides(TreeTritonAttentionImpl)


def test_other_platforms_are_refused():
    from vllm_msd.vllm_plugin.gpu.attention import register

    with pytest.raises(ConfigError, match="on NVIDIA GPUs and on the CPU, not on"):
        register()
