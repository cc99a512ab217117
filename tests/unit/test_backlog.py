"""Rows that the draft reads later, and the line about what the budget allowed."""

import torch

from vllm_msd.vllm_plugin.cpu.backlog import MAX_BYTES, Backlog
from vllm_msd.vllm_plugin.tally import Tally


def rows(*values: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor(values)
    return tokens, tokens[:, None].float()


def test_rows_of_several_steps_come_back_in_one_piece():
    backlog = Backlog(max_rows=10, row_bytes=4)
    tokens, hidden = rows(7, 8)
    backlog.keep("a", 5, tokens, hidden)
    tokens.zero_(), hidden.zero_()  # vLLM's buffers are written again in the next step
    backlog.keep("b", 2, *rows(1))
    backlog.keep("a", 7, *rows(9))
    assert backlog.num_rows == 4 and backlog.has_room(6) and not backlog.has_room(7)
    found = backlog.take(["c", "a"], [3, 8])
    assert list(found) == [1]
    assert found[1].tokens.tolist() == [7, 8, 9] and found[1].hidden.flatten().tolist() == [7, 8, 9]
    assert (found[1].first, found[1].end, backlog.num_rows) == (5, 8, 1)
    backlog.drop("b")
    assert backlog.num_rows == 0 and not backlog.take(["a", "b"], [8, 3])


def test_a_preempted_request_owes_nothing():
    """Its rows come again, so older ones neither join the new ones nor are read."""
    backlog = Backlog(10, 4)
    backlog.keep("a", 5, *rows(7, 8))
    backlog.keep("a", 2, *rows(3))
    assert backlog.num_rows == 1 and backlog.take(["a"], [3])[0].tokens.tolist() == [3]
    backlog.keep("a", 5, *rows(7))
    assert not backlog.take(["a"], [2]) and backlog.num_rows == 0


def test_hidden_states_are_bounded_in_bytes():
    assert Backlog(10**9, 1024).capacity == MAX_BYTES // 1024


def test_a_line_about_steps():
    lines, now = [], [0.0]
    tally = Tally(lines.append, 10.0, lambda: now[0])
    tally.add(8, [4, 1])
    tally.add(0, [])
    assert lines == []
    now[0] = 10.0
    tally.add(4, [3])
    assert lines == [
        "MSD drafted in 2 of 3 steps: 6.7 nodes a request, of which 2.7 were to be verified."
    ]
    now[0] = 20.0
    tally.add(0, [])
    assert lines[1:] == ["MSD drafted in 0 of 1 steps."]
