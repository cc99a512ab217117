"""Greedy answers of the demo target without speculation, from a fresh process.

    python -m tests.common.plain_answers requests.json answers.json

``requests.json`` holds a list of ``{"messages": ..., "max_tokens": ...}`` in OpenAI's chat form,
``answers.json`` gets the list of texts.
"""

import json
import sys
from pathlib import Path


def main(requests: Path, answers: Path) -> None:
    """Answer all requests in one batch."""
    from vllm import LLM, SamplingParams

    from vllm_msd.demo.paths import demo_pair

    asked = json.loads(requests.read_text())
    llm = LLM(
        model=str(demo_pair().target),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        limit_mm_per_prompt={"image": 2},
    )
    params = [SamplingParams(temperature=0, max_tokens=r["max_tokens"]) for r in asked]
    outputs = llm.chat([r["messages"] for r in asked], params, use_tqdm=False)
    answers.write_text(json.dumps([o.outputs[0].text for o in outputs]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
