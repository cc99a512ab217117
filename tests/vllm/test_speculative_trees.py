"""The size of a tree, from a request or a draft to vLLM's configuration."""

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from tests.common.configuring import configure, msd, tree
from vllm_msd.vllm_plugin.configuration import auto_sizes, capture_sizes
from vllm_msd.vllm_plugin.configuration import tree_settings as settings
from vllm_msd.vllm_plugin.configuration.capture_sizes import (
    MANY_REQUESTS,
    add_larger_graphs,
    drafted_by_requests,
)

pytestmark = pytest.mark.usefixtures("registered")


def tree_of(speculative_config):
    vllm_config = SimpleNamespace(speculative_config=speculative_config)
    config = settings.tree_config(vllm_config)
    assert settings.wants_trees(vllm_config) == (not config.is_chain)
    return config.num_nodes, config.depth, config.top_k


@pytest.fixture
def tree_pair(pair, tmp_path):
    """A pair whose draft is served as a tree unless told otherwise."""
    draft = tmp_path / "draft"
    draft.mkdir()
    for file in Path(pair.draft).iterdir():
        (draft / file.name).symlink_to(file)
    config = json.loads((draft / "config.json").read_text())
    config["target"]["name_or_path"] = pair.target
    config |= tree(12, 4, 3)
    (draft / "config.json").unlink()
    (draft / "config.json").write_text(json.dumps(config))
    return dataclasses.replace(pair, draft=str(draft))


def test_without_tree_settings_a_chain(pair):
    assert tree_of(configure(pair.target, msd(pair, tree_top_k=1))) == (5, 5, 1)
    assert tree_of(configure(pair.target, msd(pair, num_speculative_tokens=3))) == (3, 3, 1)


def test_tree_of_the_request(pair):
    config = configure(pair.target, msd(pair, **tree(24, 5, 6)))
    assert tree_of(config) == (24, 5, 6)
    assert config.num_speculative_tokens == 24
    # It travels to the workers in the draft's config.
    assert tree_of(pickle.loads(pickle.dumps(config))) == (24, 5, 6)


def test_tree_of_the_draft_and_what_overrides_it(tree_pair):
    def asked(**keys):
        return tree_of(configure(tree_pair.target, msd(tree_pair, **keys)))

    assert asked() == (12, 4, 3)
    assert asked(num_speculative_tokens=20) == (20, 4, 3)
    assert asked(tree_depth=3) == (12, 3, 3)
    assert asked(tree_top_k=1) == (12, 12, 1)
    assert asked(tree_top_k=1, num_speculative_tokens=5) == (5, 5, 1)


@pytest.mark.parametrize("sizes", [(60, 6, 10), (30, 5, 10)], ids=str)
@pytest.mark.parametrize("limits", [{"max_num_seqs": 1024, "max_num_batched_tokens": 8192}, {}])
def test_large_trees_under_the_limits_of_a_default_server(pair, sizes, limits):
    """Those of an 80 GB device, and whatever vLLM fills in by itself."""
    engine = EngineArgs(
        model=pair.target, speculative_config=msd(pair, **tree(*sizes)), max_model_len=512, **limits
    )
    config = engine.create_engine_config()
    assert tree_of(config.speculative_config) == sizes
    nodes, depth, top_k = sizes
    assert config.num_lookahead_tokens == max(nodes, (depth - 1) * top_k)
    requests = settings.requests_at_once(config, columns=152_064, element_bytes=2)
    assert requests == (128 << 20) // (top_k * 152_064 * 2) == 44
    of_rows = settings.requests_at_once(config, columns=1, element_bytes=2)
    scheduler = config.scheduler_config
    assert of_rows == min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens // top_k)
    chain = configure_all(pair, num_speculative_tokens=5)
    assert chain.num_lookahead_tokens == 5


def configure_all(pair, **keys):
    return EngineArgs(
        model=pair.target, speculative_config=msd(pair, **keys), max_model_len=512
    ).create_engine_config()


def with_graphs(pair, keys, seqs=1024, max_tokens=8192, **compilation):
    """The engine's config as on a device with CUDA graphs, whose sizes a CPU throws away."""
    config = configure_all(pair, **keys)
    config.scheduler_config.max_num_seqs = seqs
    config.scheduler_config.max_num_batched_tokens = max_tokens
    graphs = config.compilation_config
    graphs.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    graphs.cudagraph_capture_sizes = compilation.get("sizes")
    graphs.max_cudagraph_capture_size = compilation.get("largest")
    config._set_cudagraph_sizes()
    return config


def test_capture_sizes_follow_the_tree(pair):
    config = with_graphs(pair, tree(60, 6, 10))
    sizes = config.compilation_config.cudagraph_capture_sizes
    chain = with_graphs(pair, {"num_speculative_tokens": 60})
    assert set(chain.compilation_config.cudagraph_capture_sizes) < set(sizes)
    assert {61 * n for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)} <= set(sizes)
    assert sizes[-1] == config.compilation_config.max_cudagraph_capture_size == 61 * 32
    few = with_graphs(pair, tree(24, 5, 6), seqs=6).compilation_config.cudagraph_capture_sizes
    assert {25 * n for n in range(1, 7)} <= set(few)
    assert few[-1] < 25 * 6 * 2  # vLLM's own: room for twice as many rows, in steps of 16


def test_capture_sizes_follow_every_size_of_a_schedule(pair):
    schedule = {"num_speculative_tokens_per_batch_size": [[1, 4, 24], [5, 16, 7], [17, 64, 0]]}
    sizes = with_graphs(pair, tree(24, 5, 6) | schedule, seqs=64).compilation_config
    sizes = set(sizes.cudagraph_capture_sizes)
    assert {25, 50, 75, 100, *(8 * n for n in (1, 2, 5, 8, 10, 12, 16)), 64} <= sizes


@pytest.fixture
def no_device(monkeypatch):
    """Managers of CUDA graphs can be made, and say what they would capture."""
    from vllm.v1.worker.gpu import cudagraph_utils

    everywhere = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: everywhere)
    monkeypatch.setattr(
        cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None)
    )


def speculator_of(config, cls, **attributes):
    """A speculator with its managers of graphs and nothing else."""
    speculator = object.__new__(cls)
    speculator.vllm_config, speculator.device = config, "cpu"
    speculator.num_speculative_steps = config.num_speculative_tokens
    speculator.max_num_reqs = config.scheduler_config.max_num_seqs
    speculator.supports_decode_metadata_update = True
    vars(speculator).update(attributes)
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    return speculator


def graphs_of(manager):
    return manager._capture_descs[CUDAGraphMode.FULL]


@pytest.mark.usefixtures("no_device")
def test_graphs_for_sizes_that_move(pair, monkeypatch):
    """Each size has graphs of every number of requests up to 256, no other's."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    from vllm_msd.vllm_plugin.gpu.chain_speculator import ChainSpeculator

    monkeypatch.setattr(auto_sizes, "runs_v2", lambda: True)
    config = with_graphs(pair, {}, seqs=256)
    assert drafted_by_requests(config) == dict.fromkeys(range(1, 257), (0, 1, 2, 3, 5))
    manager = CudaGraphManager(
        config, "cpu", CUDAGraphMode.FULL_AND_PIECEWISE, config.num_speculative_tokens + 1
    )
    speculator = speculator_of(config, ChainSpeculator)
    for of_steps in (manager, speculator.prefill_cudagraph_manager):
        found = {}
        for desc in graphs_of(of_steps):
            found.setdefault(desc.uniform_token_count, []).append(desc.num_reqs)
        assert set(found) == {1, 2, 3, 4, 6}
        assert all(sorted(counts) == list(MANY_REQUESTS) for counts in found.values())
    levels = graphs_of(speculator.decode_cudagraph_manager)
    assert sorted(desc.num_reqs for desc in levels) == list(MANY_REQUESTS)
    # A batch between two of them pads the next one of its own kind.
    monkeypatch.setattr(manager, "_graphs_captured", True)
    for requests, rows, padded in ((9, 4, 10), (33, 6, 40), (200, 1, 224), (256, 6, 256)):
        desc = manager.dispatch(requests, requests * rows, rows, 0)
        assert (desc.num_reqs, desc.uniform_token_count) == (padded, rows)


def test_graph_sizes_of_the_user_beside_sizes_that_move(pair, monkeypatch):
    """They stay, and a warning says what follows; nothing is said of sizes that do not move."""
    said = []
    monkeypatch.setattr(capture_sizes.logger, "warning_once", said.append)
    with_graphs(pair, tree(24, 5, 6), sizes=[1, 25, 100])
    monkeypatch.setattr(auto_sizes, "runs_v2", lambda: True)
    own = with_graphs(pair, {}, seqs=256)
    own._set_cudagraph_sizes()  # as the engine's process of a server does, over what is there
    assert said == []
    config = with_graphs(pair, {}, seqs=256, sizes=[6, 12])
    assert config.compilation_config.cudagraph_capture_sizes == [6, 12]
    assert said == [capture_sizes.OWN_SIZES]


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("seqs", [256, 1024])
@pytest.mark.parametrize(
    ("sizes", "at_once", "max_tokens"),
    [((16, 6, 3), 147, 8192), ((60, 6, 10), 44, 8192), ((60, 6, 10), 209, 2048)],
    ids=str,
)
def test_graphs_of_trees_whose_sizes_move(tree_pair, monkeypatch, sizes, at_once, max_tokens, seqs):
    """No more requests than the draft's buffers hold, all numbers of levels, and few graphs."""
    from vllm_msd.vllm_plugin.gpu.speculator import TreeSpeculator

    monkeypatch.setattr(auto_sizes, "runs_v2", lambda: True)
    path = Path(tree_pair.draft) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tree(*sizes)))
    config = with_graphs(tree_pair, {}, seqs=seqs, max_tokens=max_tokens)
    shape = settings.tree_config(config).shape
    speculator = speculator_of(
        config,
        TreeSpeculator,
        shape=shape,
        compact=SimpleNamespace(width=shape.depth + 2),
        requests_at_once=at_once,
    )
    most = min(at_once, max_tokens // shape.top_k)
    rounds = graphs_of(speculator.decode_cudagraph_manager)
    counts = sorted({desc.num_reqs for desc in rounds})
    assert counts == [*(n for n in MANY_REQUESTS if n < most), most]
    levels = shape.levels_of(settings.scheduled_sizes(config))
    assert len(rounds) == len({(desc.num_reqs, desc.levels) for desc in rounds})
    assert len(rounds) == len(counts) * len(levels) <= 27 * 5
    assert max(desc.num_tokens for desc in rounds) <= max_tokens
    # A round of as many requests as fit at once has a graph, and no larger one.
    manager = speculator.decode_cudagraph_manager
    manager.graphs, manager._graphs_captured = dict.fromkeys(rounds), True
    assert manager.of_round(most, shape.depth).num_reqs == most
    assert manager.of_round(most + 1, shape.depth).cg_mode == CUDAGraphMode.NONE
    # After steps of few nodes the draft's prefill is vLLM's own.
    compact = graphs_of(speculator.compact_cudagraph_manager)
    assert max(desc.num_tokens for desc in compact) <= max_tokens
    assert {*range(1, 9)} <= {desc.num_reqs for desc in compact}
    assert len(compact) <= len(MANY_REQUESTS) + 1
    assert len(graphs_of(speculator.prefill_cudagraph_manager)) <= 6 * (len(MANY_REQUESTS) + 3)


@pytest.mark.usefixtures("no_device")
def test_graphs_of_rounds_have_the_levels_that_their_batches_ask_for(pair, monkeypatch):
    """One for each number that a batch, padded to the graph's, can ask for; none for none."""
    from vllm_msd.vllm_plugin.gpu.tree_graphs import RoundDescriptor, TreeCudaGraphManager

    schedule = {"num_speculative_tokens_per_batch_size": [[1, 5, 24], [6, 16, 3], [17, 64, 0]]}
    sizes = [25, 50, 100, 200, 400, 1600]
    config = with_graphs(pair, tree(24, 5, 6) | schedule, seqs=64, sizes=sizes)
    shape = settings.tree_config(config).shape
    drafted = drafted_by_requests(config)
    assert [drafted[n] for n in (1, 5, 6, 16, 17, 64)] == [
        (24,), (24,), (3,), (3,), (0,), (0,)
    ]  # fmt: skip
    levels = {n: shape.levels_of(nodes) for n, nodes in drafted.items()}
    manager = TreeCudaGraphManager(
        config,
        "cpu",
        CUDAGraphMode.FULL_DECODE_ONLY,
        shape.top_k,
        most_requests=64,
        levels=levels,
    )
    descs = manager._capture_descs[CUDAGraphMode.FULL]
    found = {(d.num_reqs, d.levels) for d in descs}
    assert len(descs) == len(found)
    counts = sorted({n for (_, _), (d,) in manager._candidates.items() for n in [d.num_reqs]})
    smaller = 0
    for n in counts:
        expected = {x for batch in range(smaller + 1, n + 1) for x in levels[batch]}
        assert {x for m, x in found if m == n} == expected, n
        smaller = n
    assert {x for _, x in found} == {2, 4} and max(counts) > max(n for n, _ in found)
    # Captured one number of levels after the other, the largest batches first.
    captured = []
    monkeypatch.setattr(
        TreeCudaGraphManager.__mro__[2],
        "capture",
        lambda self, create, *_: captured.extend(self._capture_descs[CUDAGraphMode.FULL]),
    )
    manager.capture(lambda **_: None, *[None] * 5)
    assert captured == sorted(descs, key=lambda d: (-d.levels, -d.num_reqs))
    manager.graphs, manager._graphs_captured = dict.fromkeys(descs), True
    assert manager.of_round(3, 4) in manager.graphs
    assert manager.of_round(6, 2) in manager.graphs
    for requests, asked in ((3, 2), (64, 4)):  # of no batch; without drafts
        assert manager.of_round(requests, asked).cg_mode == CUDAGraphMode.NONE
    assert isinstance(manager.of_round(3, 4), RoundDescriptor)


def test_a_batch_finds_the_next_graph_of_its_own_kind():
    """Not only among those of the next number of rows, which may be for other requests."""

    def desc(requests, width, rows=0, loras=0):
        return BatchExecutionDescriptor(
            CUDAGraphMode.FULL if width else CUDAGraphMode.PIECEWISE,
            rows or requests * width,
            requests,
            width,
            num_active_loras=loras,
        )

    few, most, tree_of_one, adapted = desc(2, 3), desc(6, 3), desc(1, 17), desc(5, 3, loras=1)
    any_rows = desc(None, None, rows=16)
    captured = {
        CUDAGraphMode.FULL: [most, tree_of_one, few, adapted],
        CUDAGraphMode.PIECEWISE: [any_rows],
    }
    candidates = {
        (6, 0): [few, any_rows], (12, 0): [tree_of_one, any_rows], (18, 0): [most], (19, 0): []
    }  # fmt: skip
    add_larger_graphs(candidates, captured)
    assert candidates == {
        (6, 0): [few, tree_of_one, any_rows],
        (12, 0): [tree_of_one, most, any_rows],
        (18, 0): [most],
        (19, 0): [],
    }


def test_capture_sizes_of_the_user_stay(pair):
    given = with_graphs(pair, tree(24, 5, 6), sizes=[1, 25, 100]).compilation_config
    assert given.cudagraph_capture_sizes == [1, 25, 100]
    largest = with_graphs(pair, tree(24, 5, 6), largest=64).compilation_config
    assert max(largest.cudagraph_capture_sizes) == largest.max_cudagraph_capture_size == 64


def test_schedule_of_nodes_by_batch_size(pair):
    schedule = [(1, 2, 12), (3, 4, 5), (5, 8, 0)]
    config = configure(
        pair.target,
        msd(pair, **tree(12, 4, 3), num_speculative_tokens_per_batch_size=schedule),
    )
    assert config.num_speculative_tokens_per_batch_size == schedule
    assert tree_of(config) == (12, 4, 3)


def test_min_p_and_logit_bias_only_with_trees(pair):
    chain = configure(pair.target, msd(pair, num_speculative_tokens=5))
    trees = configure(pair.target, msd(pair, **tree(12, 4, 3)))
    auto = configure(pair.target, msd(pair))
    for params in (SamplingParams(min_p=0.1), SamplingParams(logit_bias={3: 2.0})):
        params._validate_spec_decode(trees)
        params._validate_spec_decode(auto)
        with pytest.raises(VLLMValidationError, match="not yet supported with speculative"):
            params._validate_spec_decode(chain)


def test_tree_from_the_command_line(pair):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--speculative-model", pair.draft, "--num-speculative-tokens", "12"]
    flags += ["--speculative-config.tree_depth", "4", "--speculative-config.tree_top_k", "3"]
    args = parser.parse_args(["--model", pair.target, *flags])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert tree_of(config.speculative_config) == (12, 4, 3)
