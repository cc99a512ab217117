"""A target's features of a batch are those of each record alone, in every family."""

import pytest
import torch

from tests.common import tiny
from vllm_msd.training.data.batches import collate
from vllm_msd.training.data.records import parse_record
from vllm_msd.training.targets import Target


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_batched_features_are_those_of_each_record(kind, tmp_path):
    """Records of other lengths, numbers of images and, where images are cut, numbers of crops."""
    target = Target.load(tiny.build_pair(tmp_path / "pair", kind).target, "float32")
    for seed in (0, 1):
        tiny.picture(kind, seed).save(tmp_path / f"{seed}.png")
    renderer = target.renderer([tmp_path], 2048)
    records = []
    for names in (["0.png", "1.png"], [], ["1.png"]):
        turns = [("human", "<image>" * len(names) + "what is it?"), ("gpt", "it is that")]
        talk = [{"from": who, "value": said} for who, said in turns]
        image = {"image": names} if names else {}
        records.append(renderer.render(parse_record({**image, "conversations": talk})))
    together = target.features(collate(records, target.pad_id))
    assert together.visual.sum(1).tolist()[1] == 0
    for row, record in enumerate(records):
        alone = target.features(collate([record], target.pad_id))
        length = len(record.input_ids)
        for name in ("input_ids", "visual", "answer_mask", "hidden", "embeds"):
            got, expected = getattr(together, name)[row, :length], getattr(alone, name)[0]
            if name == "embeds":  # read at visual tokens only
                got, expected = got[alone.visual[0]], expected[alone.visual[0]]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
