"""Random records and draft folders, the short form of `tests/long/faults.py`."""

import pytest

from tests.common import fuzz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def test_records_are_trained_on_or_left_out(folder):
    found = fuzz.records(folder, 150, 0)
    assert len(found) == 4, found  # every outcome was met


def test_replies_are_exchanged_and_nothing_else():
    found = fuzz.replies(300, 0)
    assert len(found) == 3, found


def test_data_files_are_read_or_refused(folder):
    found = fuzz.files(folder, 100, 0)
    assert len(found) == 2, found


def test_draft_folders_are_read_or_refused():
    found = fuzz.drafts(100, 0)
    assert {"read", "refused"} <= found.keys(), found
