"""Does MSD run in real vLLM on this GPU? python tools/offline_gpu/smoke.py STAGE

imports   versions, the Python side, and vLLM's own library against PyTorch on the GPU
eager     the demo pair in fp32: without speculation, with a chain of 5 and with a tree of 24, one
          request at a time; greedy token ids must be the same, drafts accepted and rejected
graphs    the same under CUDA graphs; as many drafts must be accepted as in `eager`, where that ran
          before: wrong drafts from a replayed graph change no token, only how many are accepted
compiled  the same with torch.compile, vLLM's default

Prints a line a step with the time since the start, writes smoke_STAGE.json into $OUT, and ends with
1 if something is wrong. Without a GPU, `imports` and `eager` are rehearsals.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

START = time.monotonic()
MODULES = (
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.attention.backends.triton_attn",
    "vllm.model_executor.models.llava",
    "vllm_msd.kernels",
    "vllm_msd.vllm_plugin.draft_model",
    "vllm_msd.vllm_plugin.gpu.speculator",
    "vllm_msd.vllm_plugin.gpu.attention",
)
CHAIN, TREE = "chain", "tree"
SAMPLES, MAX_TOKENS = 7, 96
MAX_DIFFERENCE = 0.05  # of accepted drafts between stages: near ties of the draft may round apart


def say(*words: object) -> None:
    """Print with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s]", *words, flush=True)


def imports() -> bool:
    """Whether everything imports and the native operations compute what PyTorch does."""
    import torch
    import transformers
    import triton

    say("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__,
        "transformers", transformers.__version__)  # fmt: skip
    gpu = torch.cuda.is_available()
    say("GPU:", torch.cuda.get_device_name() if gpu else "none, so only imports are checked")
    import vllm
    from vllm.platforms import current_platform

    say("vllm", vllm.__version__, vllm.__file__, "platform", type(current_platform).__name__)
    good = True
    for module in MODULES:
        try:
            importlib.import_module(module)
        except Exception as error:  # the record of a module that fails is the result
            good = False
            say("FAILED", module, f"{type(error).__name__}: {error}")
    say("modules imported")
    if not gpu:
        return good
    from vllm.config import VllmConfig

    say("Model Runner V2:", VllmConfig().use_v2_model_runner)
    for name, check in {} if os.environ.get("KIT_NO_C") == "1" else NATIVE.items():
        try:
            wrong = check()
        except Exception as error:  # as above
            wrong = f"{type(error).__name__}: {error}"
        good &= not wrong
        say("native", name, wrong or "ok")
    return good


def _norm() -> str:
    import torch

    x = torch.randn(7, 4096, device="cuda", dtype=torch.bfloat16)
    weight, out = torch.rand_like(x[0]), torch.full_like(x, float("nan"))
    torch.ops._C.rms_norm(out, x, weight, 1e-5)
    y = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    return _far(out, y)


def _gate() -> str:
    import torch

    x = torch.randn(7, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.full_like(x[:, :4096], float("nan"))
    torch.ops._C.silu_and_mul(out, x)
    gate, up = x.double().chunk(2, -1)
    return _far(out, torch.nn.functional.silu(gate) * up)


def _view() -> str:
    import torch

    host = torch.arange(5, dtype=torch.int32).pin_memory()
    seen = torch.ops._C.get_cuda_view_from_cpu_tensor(host)
    host[0] = 41
    torch.cuda.synchronize()
    return "" if seen.is_cuda and seen.tolist() == [41, 1, 2, 3, 4] else f"got {seen}"


def _far(got, expected) -> str:
    error = float((got.double() - expected).norm() / expected.norm())
    return "" if error < 1e-2 else f"relative error {error}"


NATIVE: dict[str, Callable[[], str]] = {"norm": _norm, "gate": _gate, "view": _view}


def engines(stage: str) -> bool:
    """Whether the demo pair answers the same with drafts, some of them accepted, some rejected."""
    from engines import Drafting, Engine, acceptance, demo_pair, held_out_samples, options, write

    from vllm_msd.provenance import provenance

    facts = provenance(stage=stage)  # before an engine binds its threads to cores
    pair, samples = demo_pair(), held_out_samples(SAMPLES)
    plain: list[list[int]] = []
    record: dict[str, dict] = {}
    good, kept = True, []  # vLLM's state of the process ends with the first engine that does
    draftings = {"none": None, CHAIN: Drafting(5), TREE: Drafting(24, 5, 4)}
    for name, drafting in draftings.items():
        try:
            spec = {} if drafting is None else {"draft": pair.draft, "drafting": drafting}
            rows = 1 if drafting is None else drafting.num_tokens + 1
            engine = Engine(pair.target, dtype="float32", **spec, **options(stage, rows=rows))
            kept.append(engine)
            config = engine.llm.vllm_config
            say(name, "engine up; V2:", config.use_v2_model_runner,
                "graphs:", config.compilation_config.cudagraph_mode)  # fmt: skip
            engine.answer(samples[0], 8)
            answers = [engine.answer(one, MAX_TOKENS) for one in samples]
        except Exception:  # the others are still worth their time
            traceback.print_exc()
            say("FAILED", name)
            good = False
            continue
        ids = [answer.token_ids for answer in answers]
        seconds = sum(answer.decode_seconds for answer in answers)
        row = {"tokens_per_second": sum(a.decode_tokens for a in answers) / seconds}
        if drafting is None:
            plain = ids
        else:
            found = acceptance(answers)
            same = sum(one == other for one, other in zip(ids, plain, strict=False))
            row |= {"identical": same, "requests": len(ids), **found}
            good &= same == len(ids) and 0 < found["accepted"] < found["drafted"]
        record[name] = row
        say(name, json.dumps({k: v for k, v in row.items() if k != "acceptance_rate_per_position"}))
        write(f"smoke_{stage}.json", json.dumps(facts | {"arms": record}, indent=1))
    if stage != "eager":
        good &= accepts_as_eager(record, Path(os.environ.get("OUT", ".")) / "smoke_eager.json")
    return good


def accepts_as_eager(record: dict[str, dict], eager: Path) -> bool:
    """Whether chain and tree accept as many drafts as in the record of the stage `eager`."""
    if not eager.is_file():
        say("accepted drafts: not compared, there is no", eager.name)
        return True
    before = json.loads(eager.read_text())["arms"]
    good = True
    for name in (CHAIN, TREE):
        if name not in record or name not in before:
            continue
        now, then = record[name]["acceptance_length"], before[name]["acceptance_length"]
        close = abs(now - then) <= MAX_DIFFERENCE * then
        say(name, f"tokens per verification: {now:.3f}, eager {then:.3f}", "" if close else "WRONG")
        good &= close
    return good


def main() -> int:
    """Run a stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("imports", "eager", "graphs", "compiled"))
    stage = parser.parse_args().stage
    good = imports() if stage == "imports" else engines(stage)
    say(stage, "ok" if good else "WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
