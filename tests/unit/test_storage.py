"""Files written whole or not at all, and what is told when the file system refuses."""

import os
import subprocess
import sys

import pytest

from vllm_msd.errors import StorageError
from vllm_msd.storage import (
    check_file,
    check_folder,
    commit_folder,
    replacing,
    storage_errors,
    write_text,
)

# Under a limit on the size of files, which Python and the writers meet as they meet a full disk.
LIMITED = """
import resource, sys
from pathlib import Path
import torch
from tests.common.drafts import small_draft
from vllm_msd.checkpoint import save_draft
from vllm_msd.errors import StorageError
from vllm_msd.storage import storage_errors, write_text

folder = Path(sys.argv[1])
draft = small_draft("llava")
save_draft(folder / "draft", draft.config, draft.state_dict())
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

def torch_save():
    with storage_errors(folder / "a.pt"):
        torch.save(torch.zeros(10_000), folder / "a.pt")

for write in (
    lambda: write_text(folder / "a.txt", "x" * 10_000),
    lambda: save_draft(folder / "draft", small_draft("llava", 1).config, draft.state_dict()),
    lambda: save_draft(folder / "new", draft.config, draft.state_dict()),
    torch_save,
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_told_in_a_sentence_and_leaves_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert [line.partition(" cannot be written: ")[0] for line in told] == [
        str(tmp_path / "a.txt"),
        str(tmp_path / "draft" / "model.safetensors"),
        str(tmp_path / "new" / "model.safetensors"),
        str(tmp_path / "a.pt"),
    ]
    assert "File too large. Free some space" in told[0]
    assert (tmp_path / "a.txt").read_text() == "old"
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["a.pt", "a.txt", "draft/config.json", "draft/model.safetensors"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    write_text(path, "old")
    with pytest.raises(KeyError), replacing(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    for name in ("a", "a.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    commit_folder(tmp_path / "a.partial", tmp_path / "a")
    assert (tmp_path / "a" / "file").read_text() == "a.partial"
    assert os.listdir(tmp_path) == ["a"]


def test_places_are_checked_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "deeper", "--output")
    check_file(tmp_path / "new.json", "--json")
    check_file(tmp_path / "file", "--json")
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(StorageError, match=r"--output: .*file is a file, expected a folder"):
        check_folder(tmp_path / "file" / "deeper", "--output")
    with pytest.raises(StorageError, match=r"--json: .*is a folder, expected a file"):
        check_file(tmp_path, "--json")
    with pytest.raises(StorageError, match=r"--json: the folder .*new does not exist"):
        check_file(tmp_path / "new" / "a.json", "--json")
    with pytest.raises(StorageError, match="File name too long"):
        check_folder(tmp_path / ("x" * 300), "--output")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a disk that is read-only
    with pytest.raises(StorageError, match=r"--output: .* is not to be written to"):
        check_folder(tmp_path / "new", "--output")


def test_other_errors_pass():
    with pytest.raises(RuntimeError), storage_errors("a"):
        raise RuntimeError("a fault of ours")
