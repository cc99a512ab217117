"""A draft that `vllm-msd train` made for each served family: no token changes under it."""

from pathlib import Path

import pytest

from tests.common import tiny
from tests.common.chain_identity import THREE_PICTURES
from tests.common.conversations import write_conversations
from tests.common.worker import run_worker
from vllm_msd.training import TrainSettings, train
from vllm_msd.training.data.records import parse_record
from vllm_msd.training.targets import FAMILIES, Target

# The targets walk through all of them.
PRINTABLE = "".join(map(chr, range(32, 127)))


def test_every_family_is_here():
    assert set(tiny.KINDS) == set(FAMILIES)


def tokens_as_trained(pair: tiny.TinyPair, folder: Path, text: str, *seeds: int) -> int:
    """Length of a prompt if its pictures take as many rows as where training renders them."""
    target = Target.load(pair.target)
    for seed in seeds:
        tiny.picture(pair.kind, seed).save(folder / f"{seed}.png")
    question = {"from": "human", "value": text.replace("{}", "<image>")}
    talk = [question, {"from": "gpt", "value": "yes"}]
    record = parse_record({"image": [f"{seed}.png" for seed in seeds], "conversations": talk})
    rendered = target.renderer([folder], 2048).prompt(record)
    visual = int((rendered.input_ids == target.image_token_id).sum())
    placeholders = text.replace("{}", tiny.FAMILIES[pair.kind].placeholder)
    return len(target.processor.tokenizer(placeholders)["input_ids"]) - len(seeds) + visual


@pytest.mark.long
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_trained_draft_is_served_losslessly(kind, tmp_path):
    # Small Qwen3-VL models have no head of their own.
    pair = tiny.build_pair(tmp_path / "pair", kind, tied=kind == "qwen3_vl")
    text, multimodal = write_conversations(tmp_path / "data", characters=PRINTABLE)
    settings = TrainSettings(
        target=pair.target,
        output=str(tmp_path / "run"),
        text_data=[str(text)],
        multimodal_data=[str(multimodal)],
        target_dtype="float32",
        precision="no",
        device="cpu",
        steps=120,  # enough for the draft to be right now and then
        batch_size=4,
        warmup_steps=1,
        learning_rate=5e-3,
        curriculum_epochs=2,
        eval_records=1,
        eval_max_tokens=4,
    )
    train(settings)
    report = run_worker(
        "chain",
        "v1",
        kind=kind,
        target=pair.target,
        draft=str(tmp_path / "run" / "last"),  # one record does not say which is best
        cases=["mixed_batch", "chunk_inside_image"],
    )
    cases = report["cases"]
    for name, case in cases.items():
        assert case["same"], f"{name}: {case['first_difference']}"
    # Of both together: the second case is one answer, which so small a draft may not know.
    assert sum(case["accepted"] for case in cases.values()) > 20
    assert sum(case["rejected"] for case in cases.values()) > 20
    assert cases["chunk_inside_image"]["cut_inside_image"]
    served = cases["mixed_batch"]["prompt_tokens"][2]
    assert served == tokens_as_trained(pair, tmp_path, *THREE_PICTURES)
