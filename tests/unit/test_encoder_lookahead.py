"""Where a prompt's chunk may end: not right before an image that the draft would read unencoded.

Only vLLM 0.33 ends chunks there; with it, tests/vllm/test_draft_rows.py sees the rows themselves.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.multimodal.inputs import PlaceholderRange

from vllm_msd.vllm_plugin.scheduling import wrap_try_schedule_encoder_inputs


def rows_scheduled(start, rows, *, cached=(), scheduled=(), is_msd=True, is_embed=None):
    """Rows of a chunk from ``start`` on; images lie at 8 to 11 and 20 to 23."""
    images = [
        SimpleNamespace(mm_position=PlaceholderRange(offset=offset, length=4, is_embed=is_embed))
        for offset in (8, 20)
    ]
    request = SimpleNamespace(mm_features=images, num_output_placeholders=0)
    hf_config = SimpleNamespace(**({"msd_draft": True} if is_msd else {}))
    speculation = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=hf_config))
    scheduler = SimpleNamespace(
        vllm_config=SimpleNamespace(speculative_config=speculation),
        encoder_cache_manager=SimpleNamespace(get_cached_input_ids=lambda _: set(cached)),
    )
    result = (list(scheduled), rows, 100, [], [])
    wrapped = wrap_try_schedule_encoder_inputs(lambda *_: result)
    left = wrapped(scheduler, request, start, rows, 100, 1)
    assert (left[0], *left[2:]) == (result[0], *result[2:])
    return left[1]


@pytest.mark.parametrize(("start", "rows", "image"), [(0, 8, 0), (3, 5, 0), (12, 8, 1)])
def test_a_chunk_ends_a_row_before_an_image_that_is_not_encoded(start, rows, image):
    assert rows_scheduled(start, rows) == rows - 1
    assert rows_scheduled(start, rows, scheduled=[image]) == rows
    assert rows_scheduled(start, rows, cached=[image]) == rows
    assert rows_scheduled(start, rows, is_msd=False) == rows


def test_other_chunks_stay_as_they_are():
    assert rows_scheduled(0, 7) == 7
    assert rows_scheduled(0, 10, scheduled=[0]) == 10  # ends inside an image
    assert rows_scheduled(8, 4, scheduled=[0]) == 4  # ends behind one
    text_first = torch.tensor([False, True, True, True])
    assert rows_scheduled(0, 8, is_embed=text_first) == 8
    assert rows_scheduled(0, 8, is_embed=~text_first) == 7


def test_a_row_alone_waits_only_for_the_images_of_others():
    assert rows_scheduled(7, 1) == 0
    assert rows_scheduled(19, 1, cached=[0]) == 1
