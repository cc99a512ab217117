"""The acceptance profile and the model card of a draft."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from vllm_msd.checkpoint.speculators import speculators_fields
from vllm_msd.draft import MSDDraftConfig, TargetInfo
from vllm_msd.errors import ConfigError, DataError
from vllm_msd.training import TrainSettings, model_card
from vllm_msd.training.acceptance import _count_nodes
from vllm_msd.training.evaluate import _check_writable, _write
from vllm_msd.training.profile import NodeCounts, acceptance_profile, preferred_tokens
from vllm_msd.tree import TreeConfig

ROW = {"acceptance_length": 2.5, "verifications": 80, "accepted_at_depth": [0.9, 0.6]}
TABLE = {
    "all": ROW,
    "kinds": {"vqa": ROW, "text": {**ROW, "accepted_at_depth": [0.5]}},
    "profile": {"by_depth": [0.9, 0.6], "by_probability": [[0.1, 0.2], [0.8, 0.9]]},
}


def test_nodes_are_counted_by_the_product_of_their_path():
    # Two steps; row 3 begins a chain that accepts one token, row 5 one at the end of the text.
    sure = torch.zeros(2, 8)
    sure[0, 3], sure[1, 4], sure[0, 5] = 0.9, 0.5, 0.3
    nodes = NodeCounts()
    _count_nodes(nodes, sure, [(3, 1), (5, 0)], last=7)
    found = {
        round(p, 3): (n, a)
        for n, p, a in zip(nodes.nodes, nodes.probability, nodes.accepted, strict=True)
        if n
    }
    assert found == {0.9: (1, 1), 0.45: (1, 0), 0.3: (1, 0)}


def test_profile_rises_and_leaves_out_what_was_hardly_seen():
    nodes = NodeCounts()
    for probability, accepted, count in ((0.3, 0.6, 40), (0.45, 0.4, 40), (0.9, 0.9, 40)):
        for i in range(count):
            nodes.add(probability, i < accepted * count)
    nodes.add(0.001, False)
    assert nodes.table() == [[0.375, 0.5], [0.9, 0.9]]
    other = NodeCounts()
    other.join(nodes)
    assert other.table() == nodes.table()
    profile = acceptance_profile(50, [40, 20], nodes)
    assert profile == {"by_depth": [0.8, 0.4], "by_probability": [[0.375, 0.5], [0.9, 0.9]]}
    assert acceptance_profile(49, [40, 20], nodes) is None


@pytest.mark.parametrize(
    ("by_depth", "tokens"),
    [
        ([0.0], 1),
        ([0.5, 0.05, 0.01], 1),
        ([0.5217, 0.2878, 0.1922, 0.1225, 0.0812], 3),  # 2.00 / 1.3 is more than 1.81 / 1.2
        ([0.9, 0.8, 0.7, 0.6, 0.5], 5),  # as deep as was measured
    ],
)
def test_as_many_tokens_are_preferred_as_pay(by_depth, tokens):
    assert preferred_tokens(by_depth) == tokens


def config(target: str, size: int | None = None) -> MSDDraftConfig:
    return MSDDraftConfig(
        layer_type="llama", hidden_size=8, intermediate_size=8, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, num_hidden_layers=1, rms_norm_eps=1e-5, rope_theta=1e4,
        vocab_size=9, max_position_embeddings=64, attention_bias=False, input_norm=False,
        msd_acceptance=TABLE["profile"], target=TargetInfo(target), draft_vocab_size=size,
    )  # fmt: skip


def card(target: str, table: dict | None, size: int | None = None, **changes: str) -> str:
    settings = TrainSettings(
        target=target, output="o", text_data=["t"], curriculum="text", **changes
    )
    note = {
        "steps": 7, "minutes": 1.5, "machine": {"processor": "P", "cores": 2},
        "versions": {"vllm-msd": "0.1", "torch": "2"},
        "data": [{"file": "t.json", "records": 3, "sha256": "ab" * 32}],
    }  # fmt: skip
    return model_card.model_card(config(target, size), note, settings, table)


def test_card_says_target_data_settings_acceptance_and_how_to_serve():
    text = card("org/model", TABLE, license="apache-2.0")
    about = ModelCard(text).data
    assert (about.license, about.base_model, about.library_name) == (
        "apache-2.0", "org/model", "vllm",
    )  # fmt: skip
    assert "vllm serve org/model --speculative-config" in text
    assert "| vqa | 2.50 | 0.90 | 0.60 |" in text
    assert "| text | 2.50 | 0.50 | 0.00 |" in text
    assert "| t.json | 3 | `abababababababab` |" in text
    assert "| `draft_steps` | 3 |" in text
    assert "| `draft_vocab` | all 9 tokens |" in text
    trimmed = card("org/model", TABLE, size=4, draft_vocab="/home/someone/trimmed")
    assert "| `draft_vocab` | 4 of 9 tokens |" in trimmed and "someone" not in trimmed


def test_card_of_a_local_target_names_no_folder_of_the_machine():
    text = card("/home/someone/models/big", None)
    assert "someone" not in text and "`big`" in text and "Not measured." in text
    assert ModelCard(text).data.license == "other"


def test_eval_writes_profile_and_card_into_the_drafts_folder(tmp_path):
    own = config("x/y")
    fields = own.to_dict() | speculators_fields(own, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / model_card.CARD).write_text(card("x/y", None))
    chain = TreeConfig.from_settings(5, None, None)
    _check_writable(tmp_path, tmp_path, chain)
    _write(tmp_path, TABLE)
    written = json.loads((tmp_path / "config.json").read_text())
    assert MSDDraftConfig.from_dict(written).msd_acceptance == TABLE["profile"]
    assert written["num_speculative_tokens"] == 2  # of the profile's two depths both pay
    text = (tmp_path / model_card.CARD).read_text()
    assert "| vqa | 2.50 |" in text and '"num_speculative_tokens": 2}' in text
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2
    (tmp_path / "config.json").write_text(json.dumps(written | {
        "num_speculative_tokens": 7, "tree_depth": 3, "tree_top_k": 2,
    }))  # fmt: skip
    _write(tmp_path, TABLE)
    assert json.loads((tmp_path / "config.json").read_text())["num_speculative_tokens"] == 7
    with pytest.raises(DataError, match="got 80 verifications, expected at least 50"):
        _write(tmp_path, {k: v for k, v in TABLE.items() if k != "profile"})


def test_eval_refuses_to_write_where_a_profile_has_no_place(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    chain = TreeConfig.from_settings(5, None, None)
    for folder, tree, reason in (
        (tmp_path, chain, "vllm-msd convert"),
        (Path("org/name"), chain, "Fetch the draft"),
        (tmp_path, TreeConfig.from_settings(8, 3, 2), "counted on chains"),
    ):
        with pytest.raises(ConfigError, match=reason):
            _check_writable(tmp_path, folder, tree)
