"""Training with a large vocabulary holds no logits of a whole sequence, let alone of a batch."""

import json
import subprocess
import sys

import pytest

from tests.common.worker import HANGS

ROWS, HIDDEN, VOCAB = 2048, 64, 152_064  # Qwen2-VL's vocabulary
MATRIX = 4 * ROWS * VOCAB  # bytes of one sequence's logits in float32: 1.2 GB

# A fresh process: its peak is nobody else's.
_PROGRAM = r"""
import json, re, sys
from pathlib import Path
import torch
from vllm_msd.draft import DraftRows, MSDDraft, MSDDraftConfig
from vllm_msd.training.acceptance import _choice
from vllm_msd.training.objective import DraftObjective

rows, hidden, vocab = map(int, sys.argv[2:])
torch.manual_seed(0)
config = MSDDraftConfig(
    layer_type="qwen2", hidden_size=hidden, intermediate_size=2 * hidden, num_attention_heads=2,
    num_key_value_heads=2, head_dim=hidden // 2, num_hidden_layers=1, rms_norm_eps=1e-6,
    rope_theta=1e6, vocab_size=vocab, max_position_embeddings=rows, attention_bias=True,
    input_norm=True,
)
objective = DraftObjective(MSDDraft(config))
head = torch.randn(vocab, hidden)

def work(count):
    shape = (1, count)
    inputs = DraftRows(
        torch.randn(*shape, hidden), torch.randn(*shape, hidden), torch.zeros(shape).bool(),
        torch.arange(count)[None], torch.ones(shape).bool(),
    )
    if sys.argv[1] == "evaluation":
        return _choice(head, None, inputs.hidden_states)
    mask = torch.ones(shape).bool()
    mask[:, -1] = False
    loss, _ = objective(inputs, torch.randn(*shape, hidden), mask, head)
    loss.backward()

def memory(field):
    # Not getrusage: its peak counts the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(field + r":\s+(\d+) kB", status)[1])

work(8)
before = memory("VmRSS")
work(rows)
print(json.dumps(memory("VmHWM") - before))
"""


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_no_sequence_by_vocabulary_matrix_is_held(part):
    command = [sys.executable, "-c", _PROGRAM, part, *map(str, (ROWS, HIDDEN, VOCAB))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    grown = json.loads(done.stdout)
    assert 0 < grown < MATRIX / 2, f"{grown / MATRIX:.2f} of the matrix"
