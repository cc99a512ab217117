"""Which rows go through the tree kernel and which to the backend around which it stands.

FLASH_ATTN cannot run here, so both ways have stand-ins that record what they are asked for; its
metadata builder is vLLM's own. TRITON_ATTN is computed in `test_triton_tree_backend`. Also here:
what a user may ask for, and what is chosen otherwise.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from tests.common.attention_layers import (
    HEADS,
    KV_HEADS,
    common_metadata,
    make_builder,
    make_layer,
    rows_of,
    run,
    tree_and_chain_configs,
)
from tests.common.tree_batches import Request, make_batch
from vllm_msd.errors import ConfigError
from vllm_msd.vllm_plugin.configuration.tree_backend import tree_attention_backend
from vllm_msd.vllm_plugin.trees.attention import ATTRIBUTE

TREE = [-1, 0, 0, 1, 1, 2, 2]
REQUESTS = [Request(40, TREE), Request(33, TREE, queries=12), Request(25), Request(21, queries=9)]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return tree_and_chain_configs(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def batch():
    return make_batch(REQUESTS, heads=HEADS, kv_heads=KV_HEADS)


def split():
    from vllm_msd.vllm_plugin.gpu.split import Split

    return Split(2, len(TREE) + 12, 12)


def flash():
    from vllm_msd.vllm_plugin.gpu.flash_backend import TreeFlashAttentionBackend

    return TreeFlashAttentionBackend


def test_flash_attention_gets_exactly_the_rows_without_drafts(configs, batch, monkeypatch):
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    from vllm_msd.vllm_plugin.gpu import attention

    layer = make_layer(configs["trees"], flash())
    assert isinstance(layer.impl, attention.TreeAttentionImpl)
    assert isinstance(layer.impl, FlashAttentionImpl)
    asked = []

    def kernel(q, k, v, table, seq_lens, starts, tree_start, ancestors, scale, *, out, **more):
        asked.append(("kernel", seq_lens.tolist(), starts.tolist(), tree_start.tolist()))
        assert len(table) == len(seq_lens) and len(ancestors) == len(q) == len(out)
        assert more["max_query_len"] == 12
        out.fill_(1)

    def forward(self, layer, query, key, value, kv_cache, metadata, output):
        asked.append(("parent", metadata.seq_lens.tolist(), metadata.query_start_loc.tolist()))
        assert metadata.num_actual_tokens == len(query) == len(output)
        assert torch.equal(query, batch.args[0][-len(query) :])
        assert torch.equal(metadata.block_table, batch.args[3][-len(metadata.seq_lens) :])
        assert metadata.slot_mapping.tolist() == list(range(len(batch.args[0])))[-len(query) :]
        output.fill_(2)
        return output

    monkeypatch.setattr(attention, "tree_attention", kernel)
    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    builder = make_builder(configs["trees"], flash())
    metadata = builder.build(0, common_metadata(batch), split=split())
    cache = torch.zeros(8, KV_HEADS, 16, 128)
    setattr(metadata, ATTRIBUTE, rows_of(batch))
    output = run(layer, batch, cache, metadata)
    assert asked == [
        ("kernel", [47, 40], [0, 7, 19], [40, 33]),
        ("parent", [25, 21], [0, 1, 10]),
    ]
    assert (output[:19] == 1).all() and (output[19:] == 2).all()

    asked.clear()  # the draft's prefill, and a pass without trees
    layer.is_draft_layer = True
    run(layer, batch, cache, metadata)
    layer.is_draft_layer = False
    run(layer, batch, cache, builder.build(0, common_metadata(batch)))
    assert asked == [("parent", [47, 40, 25, 21], [0, 7, 19, 20, 29])] * 2


def test_what_is_prepared_on_the_device_is_that_of_the_rest(configs, batch, monkeypatch):
    """FLASH_ATTN prepares a schedule in one buffer; the last call decides what lies there."""
    prepared = []
    make_layer(configs["trees"], flash())
    builder = make_builder(configs["trees"], flash())
    builder.aot_schedule = True

    def schedule(*, aot_schedule, batch_size, **more):
        if aot_schedule:
            prepared.append(batch_size)

    monkeypatch.setattr(builder, "_get_scheduler_metadata", schedule)
    builder.build(0, common_metadata(batch), split=split())
    builder.build(0, common_metadata(batch))
    assert prepared == [2, 4]


def test_arguments_are_checked_once_a_pass(configs, batch, monkeypatch):
    from vllm_msd.vllm_plugin.gpu import attention
    from vllm_msd.vllm_plugin.gpu.triton_backend import TreeTritonAttentionBackend

    checked = []
    monkeypatch.setattr(
        attention, "tree_attention", lambda *args, check, **more: checked.append(check)
    )
    layer = make_layer(configs["trees"])
    metadata = make_builder(configs["trees"], TreeTritonAttentionBackend).build(
        0, common_metadata(batch)
    )
    cache = torch.zeros(8, KV_HEADS, 16, 128)
    for _ in range(2):
        setattr(metadata, ATTRIBUTE, rows_of(batch))
        for _ in range(3):
            run(layer, batch, cache, metadata)
    assert checked == [True, False, False] * 2


def test_an_engines_layers_share_one_workspace(configs):
    from vllm_msd.vllm_plugin.gpu.attention import provide_workspace

    layers = [make_layer(configs["trees"]) for _ in range(2)]
    other, chain = make_layer(configs["trees"]), make_layer(configs["chains"])
    provide_workspace([*layers, chain, SimpleNamespace()], torch.device("cpu"))
    provide_workspace([other], torch.device("cpu"))
    first, second = (layer.impl.workspace for layer in layers)
    assert first is second is not None
    assert other.impl.workspace is not first and chain.impl.workspace is None


def test_a_batch_is_parted_behind_its_drafts():
    from vllm_msd.vllm_plugin.gpu.split import DraftsFirst, Split

    def of(scheduled, drafts):
        return Split.of(
            SimpleNamespace(
                num_scheduled_tokens=np.array(scheduled),
                num_draft_tokens_per_req=None if drafts is None else np.array(drafts),
            )
        )

    assert of([7, 12, 1, 9], [6, 6, 0, 0]) == split()
    assert of([7, 3], [6, 2]) == Split(2, 10, 7)
    assert of([1, 9], None) == of([1, 9], [0, 0]) == Split(0, 0, 0)
    with pytest.raises(RuntimeError, match=r"expected the 2 requests with drafts first"):
        of([7, 1, 12], [6, 0, 6])
    builder = object.__new__(flash().get_builder_cls())
    assert DraftsFirst(split()).get_extra_attn_kwargs(builder, 4) == {"split": split()}
    assert DraftsFirst(split()).get_extra_attn_kwargs(builder, 2) == {}  # nothing is left
    assert DraftsFirst(split()).get_extra_attn_kwargs(object(), 4) == {}


def test_the_methods_that_are_replaced_are_there():
    from vllm_msd.vllm_plugin.gpu.triton_backend import TreeTritonAttentionBackend
    from vllm_msd.vllm_plugin.patches.overrides import check_overrides

    for backend in (flash(), TreeTritonAttentionBackend):
        check_overrides(backend.get_impl_cls())
        check_overrides(backend.get_builder_cls())


class OnGPU:
    """The platform as it says of itself on a GPU, with a choice of its own."""

    def __init__(self, choice):
        self.choice = choice

    def is_cuda(self):
        return True

    def get_attn_backend_cls(self, selected, attn_selector_config, num_heads=None):
        assert selected is None and attn_selector_config.head_size == 32
        return self.choice


FLASH = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
OTHER = "vllm.v1.attention.backends.flex_attention.FlexAttentionBackend"


@pytest.fixture
def backend(pair, registered, monkeypatch):
    target = EngineArgs(model=pair.target).create_model_config()

    def ask(request=None, choice=FLASH, **engine):
        monkeypatch.setattr("vllm.platforms.current_platform", OnGPU(choice))
        arguments = EngineArgs(model=pair.target, **engine)
        return tree_attention_backend(arguments, request or {}, target).name

    return ask


def test_the_users_backend_is_honoured(backend):
    for name in ("FLASH_ATTN", "TRITON_ATTN"):
        assert backend(attention_backend=name) == name
        assert backend(attention_config={"backend": name}) == name
        assert backend(attention_config={"backend_per_kind": {"full_attention": name}}) == name
        assert backend({"attention_backend": name}) == name


def test_without_one_it_is_vllms_choice_or_triton(backend):
    assert backend() == "FLASH_ATTN"
    assert backend(choice=OTHER) == "TRITON_ATTN"
    assert backend(kv_cache_dtype="fp8") == "TRITON_ATTN"


def test_other_backends_are_refused(backend):
    for request, engine in (
        ({}, {"attention_backend": "FLASHINFER"}),
        ({}, {"attention_config": {"backend": "FLASHINFER"}}),
        ({}, {"attention_config": {"backend_per_kind": {"full_attention": "FLASHINFER"}}}),
        ({"attention_backend": "FLASHINFER"}, {}),
    ):
        with pytest.raises(ConfigError, match="got FLASHINFER, but draft trees on a GPU need"):
            backend(request, **engine)
    with pytest.raises(ConfigError, match=r"got attention_backend FLASH_ATTN, speculative_config"):
        backend({"attention_backend": "TRITON_ATTN"}, attention_backend="FLASH_ATTN")
    with pytest.raises(ConfigError, match="got FLASH_ATTN with kv_cache_dtype 'fp8'"):
        backend(attention_backend="FLASH_ATTN", kv_cache_dtype="fp8")
