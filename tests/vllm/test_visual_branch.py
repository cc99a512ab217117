"""The demo draft reads the image: with another request's image its guesses are accepted less.

In a process of its own, like the benchmark whose figures the README gives; here few requests.
"""

import json
import subprocess
import sys

from tests.common.server import REPOSITORY


def test_swapping_the_image_in_the_draft_lowers_acceptance(tmp_path, fresh_process):
    output = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/visual_branch.py", "--num-prompts", "24"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **fresh_process,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    figures = json.loads(output.read_text())
    assert figures["identical"] == figures["requests"] == 24
    own, swapped = (figures["all"][name] for name in ("own_image", "swapped_image"))
    assert 0 < swapped["accepted"] < swapped["drafted"]
    assert swapped["acceptance_length"] < 0.95 * own["acceptance_length"]
