"""A published checkpoint for the tests of checkpoints."""

import pytest

from tests.common.drafts import write_published


@pytest.fixture
def llava(tmp_path):
    """A published llava draft: its folder and its weights."""
    return tmp_path / "draft", write_published(tmp_path / "draft", "llava")
