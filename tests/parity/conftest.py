"""The reference vectors, read from a folder in the format its README describes.

The folder is ``tests/data/reference`` or the one named by ``MSD_REFERENCE_DIR``. Every size, name
and number is taken from its files.
"""

import hashlib
import json
import os
import re
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_msd.draft import DraftRows, MSDDraft, MSDDraftConfig, shift
from vllm_msd.tree import TreeShape

DEFAULT_DIR = Path(__file__).parents[1] / "data" / "reference"
REFERENCE_DIR = Path(os.environ.get("MSD_REFERENCE_DIR", DEFAULT_DIR))


@pytest.fixture(autouse=True)
def one_thread():
    """As the vectors were recorded: with more threads, sums are split up in another order, and a
    tree's deeper levels come out further from the reference than its tolerance."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reference:
    """One ``X.json`` with its ``X.safetensors``."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.info = json.loads(path.read_text())
        self.path = path.with_suffix(".safetensors")

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        tensors = load_file(self.path)
        for name, entry in self.info["tensors"].items():
            assert list(tensors[name].shape) == entry["shape"], name
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def matches(self, pattern: str) -> list[str]:
        """First group of every tensor name that the pattern matches as a whole, in file order."""
        found = (re.fullmatch(pattern, name) for name in self.info["tensors"])
        return [m[1] for m in found if m]


class DraftReference(Reference):
    """A draft with prompts, trees and continuations."""

    @cached_property
    def config(self) -> MSDDraftConfig:
        return MSDDraftConfig.from_dict(self.info["config"])

    def _matrix(self, name: str, stored: str) -> Tensor:
        if stored in self.info["tensors"]:
            return self[stored]
        recipe = self.info["generated_matrices"][name]
        draw = np.random.RandomState(recipe["seed"]).randint(-127, 128, size=recipe["shape"])
        matrix = draw.astype("<f4") / np.float32(2 ** recipe["shift"])
        assert hashlib.sha256(matrix.tobytes()).hexdigest() == recipe["sha256_of_float32_le_bytes"]
        return torch.from_numpy(matrix)

    @cached_property
    def embedding(self) -> Tensor:
        return self._matrix("embed_tokens.weight", "draft.embed_tokens.weight")

    @cached_property
    def lm_head(self) -> Tensor:
        return self._matrix("lm_head.weight", "lm_head.weight")

    @cached_property
    def draft(self) -> MSDDraft:
        keys = self.info["draft_state_dict_keys"]
        state = {k: self[f"draft.{k}"] for k in keys if f"draft.{k}" in self.info["tensors"]}
        state.setdefault("embed_tokens.weight", self.embedding)
        return MSDDraft.from_state_dict(self.config, state).eval()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.draft.embed_tokens(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.lm_head.T

    def shape(self, tree: str) -> TreeShape:
        return TreeShape(**self.info["trees"][tree])

    def num_calls(self, case: str) -> int:
        return len(self.matches(re.escape(case) + r"\.call(\d+)\.draft_tokens"))

    def num_steps(self, call: str) -> int:
        return len(self.matches(re.escape(call) + r"\.step(\d+)\.out"))

    def expanded_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Token ids and visual mask ``[1, L]``; a negative id stands for a whole image."""
        ids = self[f"{prompt}.prompt.input_ids"]
        width = self[f"{prompt}.prompt.inputs_embeds"].shape[1]
        images = int((ids < 0).sum())
        per_image = (width - (ids.shape[1] - images)) // images if images else 0
        ids = ids[0].repeat_interleave(torch.where(ids[0] < 0, per_image, 1))[None]
        return ids, (ids < 0) | (ids == self.info["config"].get("image_token_id", -1))

    def prompt_rows(self, prompt: str, root: Tensor) -> DraftRows:
        """Draft rows of a prompt followed by the root ``[1]``."""
        ids, visual = self.expanded_prompt(prompt)
        embeds = self[f"{prompt}.prompt.inputs_embeds"]
        hidden = self[f"{prompt}.prompt.hidden_states"]
        return shift(embeds, hidden, ids, root, visual, self.embed)


def _load() -> tuple[list[DraftReference], list[Reference]]:
    drafts, others = [], []
    for path in sorted(REFERENCE_DIR.glob("*.json")):
        is_draft = "draft_state_dict_keys" in json.loads(path.read_text())
        (drafts.append(DraftReference(path)) if is_draft else others.append(Reference(path)))
    if not drafts:
        raise RuntimeError(f"no reference vectors in {REFERENCE_DIR}; check MSD_REFERENCE_DIR")
    return drafts, others


DRAFTS, OTHERS = _load()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by what the folder holds: ``ref`` alone, or with prompt and tree."""
    names = metafunc.fixturenames
    if "tree" in names:
        cases = [
            (r, p, t)
            for r in DRAFTS
            for p in r.matches(r"(.+)\.prompt\.input_ids")
            for t in r.info["trees"]
        ]
        ids = [f"{r.name}-{p}-{t}" for r, p, t in cases]
        metafunc.parametrize(("ref", "prompt", "tree"), cases, ids=ids)
    elif "ref" in names:
        metafunc.parametrize("ref", DRAFTS, ids=[r.name for r in DRAFTS])
    elif "verification" in names:
        found = [r for r in OTHERS if "greedy.node_logits" in r.info["tensors"]]
        metafunc.parametrize("verification", found, ids=[r.name for r in found])
    elif "training_ref" in names:
        found = [r for r in OTHERS if "loss_weights" in r.info]
        metafunc.parametrize("training_ref", found, ids=[r.name for r in found])


@pytest.fixture(scope="session")
def draft_references() -> list[DraftReference]:
    return DRAFTS


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
