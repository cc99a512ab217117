"""Which files a draft is read from: the ones that vLLM's loader reads, by every reader alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from tests.common import tiny
from tests.common.drafts import write_published
from tests.common.worker import run_worker
from vllm_msd.checkpoint import inspect_draft, load_draft, load_draft_config
from vllm_msd.checkpoint.files import weight_files
from vllm_msd.errors import CheckpointError

WHOLE, SHARDS = "model.safetensors", ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
INDEX = "model.safetensors.index.json"
BIN, BIN_SHARDS = "pytorch_model.bin", ("pytorch_model-1.bin", "pytorch_model-2.bin")
BIN_INDEX = "pytorch_model.bin.index.json"
# Files of a folder; an index lists the shards, or the file after a colon.
READ = [
    [WHOLE],
    [*SHARDS],
    [*SHARDS, INDEX],
    [WHOLE, *SHARDS, INDEX],
    [WHOLE, *SHARDS, f"{INDEX}:{WHOLE}"],
    [WHOLE, BIN],
    [WHOLE, BIN, BIN_INDEX, *BIN_SHARDS],
    [BIN],
    [BIN, "training_args.bin", "optimizer.bin"],
    [*BIN_SHARDS, BIN_INDEX],
    [BIN, f"{INDEX}:{WHOLE}"],
    ["other.safetensors"],
    ["other.bin"],
    [".hidden.safetensors", BIN],
]
REFUSED = [
    [WHOLE, *SHARDS],
    [BIN, *BIN_SHARDS, BIN_INDEX],
    [SHARDS[0]],
    [WHOLE, "consolidated.safetensors"],
    ["model.pt"],
]


def write(folder: Path, names: list[str]) -> None:
    """A small draft's folder; every weight file holds what its name says."""
    state = write_published(folder, "llava")
    (folder / BIN).unlink()
    half = sorted(state)[: len(state) // 2]
    for name in names:
        file, _, listed = name.partition(":")
        part = state
        if "1" in file:
            part = {n: state[n] for n in half}
        elif "2" in file:
            part = {n: x for n, x in state.items() if n not in half}
        if file.endswith(".json"):
            shards = SHARDS if file == INDEX else BIN_SHARDS
            table = {n: listed or shards[n not in half] for n in state}
            (folder / file).write_text(json.dumps({"weight_map": table}))
        elif file.endswith(".safetensors"):
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)


@pytest.mark.parametrize("names", READ + REFUSED, ids=" ".join)
def test_files_are_those_of_vllm_or_refused_by_all(names, tmp_path):
    write(tmp_path, names)
    loader = DefaultModelLoader(LoadConfig())
    _, served, *_ = loader._prepare_weights(str(tmp_path), None, None, True, None)
    try:
        assert sorted(map(Path, served)) == weight_files(tmp_path)[0]
    except CheckpointError:
        assert names in REFUSED
    told = set()
    for read in (load_draft_config, load_draft):
        try:
            read(tmp_path)
        except CheckpointError as error:
            told.add(str(error))
    try:
        told |= {p for p in inspect_draft(tmp_path)["problems"] if p not in "".join(told)}
    except CheckpointError as error:
        told.add(str(error))
    assert len(told) == (names in REFUSED), told


@pytest.mark.long
def test_a_draft_as_users_have_it_is_served(tmp_path):
    """No bias in its fusion layer, saved rotary tables, shards beside another whole file."""
    pair = tiny.build_pair(tmp_path / "pair", "llava")
    folder = Path(pair.published)
    state = load_file(folder / WHOLE)
    del state["fc.bias"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bias": False}))
    state["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    state["rotary_emb.cos_cached"] = torch.ones(4, 16)
    half = sorted(state)[: len(state) // 2]
    parts = {n: x for n, x in state.items() if n in half}, dict(state)
    for name in half:
        del parts[1][name]
    for file, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / file)
    table = {name: SHARDS[name not in half] for name in state}
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    # What would be read if the index were not: another draft, which is right about nothing.
    save_file({n: torch.randn_like(x) for n, x in state.items()}, folder / WHOLE)
    assert not inspect_draft(folder)["problems"]
    report = run_worker(
        "chain", "v1", kind="llava", target=pair.target, draft=str(folder), cases=["mixed_batch"]
    )
    case = report["cases"]["mixed_batch"]
    assert case["same"], case["first_difference"]
    assert case["accepted"] > 50 and case["rejected"] > 0
