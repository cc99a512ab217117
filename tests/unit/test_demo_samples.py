"""The held-out samples in the package: the generator's, and as many as the demo can ask for."""

import json

import pytest

from demo_factory import held_out
from vllm_msd.demo.samples import FOLDER, INDEX, WORLD_KINDS, held_out_samples
from vllm_msd.demo.scoring import score
from vllm_msd.errors import ConfigError


def test_samples_are_the_generators():
    kept, made = held_out_samples(), held_out.held_out_samples()
    assert len(kept) == len(made) == held_out.COUNT
    for one, other in zip(kept, made, strict=True):
        fields = vars(other)
        assert vars(one) == {name: fields[name] for name in fields if name != "labels"}


def test_kinds_take_turns_and_answers_are_right():
    samples = held_out_samples(14)
    assert [one.kind for one in samples] == [*WORLD_KINDS] * 2
    for one in samples:
        assert score(one, one.answer) == 1 and score(one, "I cannot say.") == 0
        parts = [part["type"] for message in one.prompt for part in message["content"]]
        assert parts.count("image") == len(one.images) == (one.kind != "text")


def test_files_are_those_of_the_index_and_written_the_same_again(tmp_path):
    held_out.write(held_out_samples(), tmp_path)
    names = {path.name for path in FOLDER.iterdir()}
    listed = [name for row in json.loads((FOLDER / INDEX).read_text()) for name in row["images"]]
    assert names == {path.name for path in tmp_path.iterdir()} == {INDEX, *listed}
    assert (FOLDER / INDEX).read_bytes() == (tmp_path / INDEX).read_bytes()


def test_more_than_there_are_is_a_users_mistake():
    with pytest.raises(ConfigError, match=f"got {held_out.COUNT + 1} .* at most the 105"):
        held_out_samples(held_out.COUNT + 1)
