"""What vLLM counts while it answers the last questions of conversations on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def acceptance_counters(
    runner: str,
    target: str,
    draft: str,
    data: list[str],
    ways: dict[str, dict[str, Any]],
    max_tokens: int,
) -> dict[str, dict[str, Any]]:
    """vLLM's counters ``vllm:spec_decode_num_*`` after greedy replies, for each way of drafting.

    Args:
        runner: the model runner that is expected.
        target, draft: folders.
        data: files of conversations; images lie beside them.
        ways: name to arguments of `open_engine`.
        max_tokens: of a reply.
    """
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from tests.common.fp32_engine import runner_of, running_engine
    from vllm_msd.training.data.index import RecordFile

    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = []
    for path in data:
        file = RecordFile(Path(path))
        for record in map(file.__getitem__, range(len(file))):
            ids = tokenizer.apply_chat_template(
                record.messages[:-1], add_generation_prompt=True, return_dict=False
            )
            prompts.append({"prompt_token_ids": ids})
            if record.images:
                images = [Image.open(Path(path).parent / name) for name in record.images]
                prompts[-1]["multi_modal_data"] = {"image": images}
    report = {}
    for name, drafting in ways.items():
        with running_engine(target, draft, **drafting) as engine:
            assert runner_of(engine) == runner
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            outputs = engine.generate(prompts, params, use_tqdm=False)
            prefix = "vllm:spec_decode_num_"
            report[name] = {
                metric.name.removeprefix(prefix): getattr(metric, "value", None)
                or getattr(metric, "values", 0)
                for metric in engine.get_metrics()
                if metric.name.startswith(prefix)
            }
            report[name]["requests"] = len(outputs)
            report[name]["tokens"] = sum(len(o.outputs[0].token_ids) for o in outputs)
    return report
