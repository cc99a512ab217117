"""A vLLM that the plugin does not fit: untouched and working, until somebody asks it for MSD.

The misfit is made while vLLM is imported, by a ``sitecustomize`` on PYTHONPATH, so that every one
of its processes has it: another version number, a patch point with other parameters, and a
registration that Transformers refuses.
"""

import json
import logging
import os
import subprocess
import sys
from unittest import mock

import pytest

from tests.common import tiny
from tests.common.worker import HANGS, REPOSITORY

SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder

class Misfit:
    def find_spec(self, name, path=None, target=None):
        if name != {module!r}:
            return None
        spec = PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            exec({change!r}, vars(module))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Misfit())
"""
CHANGED_METHOD = """
_original = Scheduler._try_schedule_encoder_inputs
Scheduler._try_schedule_encoder_inputs = lambda self, *args, **kw: _original(self, *args, **kw)
"""
MISFITS = {
    "version": (
        "vllm._version",
        "__version__ = '0.34.0'",
        "vllm-msd supports vLLM 0.32-0.33, got 0.34.0. Install a vLLM in the range 0.32-0.33, or ",
    ),
    "patch point": (
        "vllm.v1.core.sched.scheduler",
        CHANGED_METHOD,
        "vllm-msd patch 'image-read-ahead' does not fit vLLM 0.3",
    ),
    "registration": (
        "transformers.models.auto.configuration_auto",
        "AutoConfig.register = None",
        "vllm-msd could not be set up with vLLM 0.3",
    ),
}
PROGRAM = """
import json, sys
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_msd.errors import MSDError
from vllm_msd.vllm_plugin import plugin
from vllm_msd.vllm_plugin.patches.ledger import PATCHES

target, draft, with_engine = sys.argv[1], sys.argv[2], sys.argv[3] == "engine"

def config(**arguments):
    arguments = EngineArgs(model=target, max_model_len=512, **arguments)
    return arguments.create_engine_config().speculative_config

def refusal(**arguments):
    try:
        return f"allowed: {config(**arguments)}"
    except MSDError as error:
        return f"{type(error).__name__}: {error}"

ngram = {"method": "ngram", "num_speculative_tokens": 2}
report = {
    "plain": config() is None,
    "ngram": config(speculative_config=ngram).method,
    "refusals": [
        refusal(speculative_config={"method": "msd"}),
        refusal(speculative_config={"model": "msd"}),
        refusal(spec_method="msd"),
        refusal(spec_model="msd"),
        refusal(spec_model=draft),
    ],
    "applied": [patch.name for patch in PATCHES if patch.is_applied()],
    "models": [name for name in ModelRegistry.get_supported_archs() if "Msd" in name],
}
hook = EngineArgs.create_speculative_config
plugin.register()
report["hooked once"] = EngineArgs.create_speculative_config is hook
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
report["flags"] = parser.parse_args(["--spec-method", "ngram", "--spec-model", "x"]).spec_method
if with_engine:
    engine = LLM(
        model=target, dtype="float32", enforce_eager=True, max_model_len=512,
        kv_cache_memory_bytes=64 << 20, limit_mm_per_prompt={"image": 1},
    )
    (output,) = engine.generate(["hello"], SamplingParams(max_tokens=3, ignore_eos=True))
    report["generated"] = len(output.outputs[0].token_ids)
print("REPORT", json.dumps(report))
for flags in (["--spec-method", "msd"], ["--spec-model=msd"], ["--speculative-model", "any"]):
    try:
        parser.parse_args(flags)
    except SystemExit as error:
        print("EXIT", error.code)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return tiny.build_pair(tmp_path_factory.mktemp("pair"), "llava")


@pytest.mark.parametrize("misfit", MISFITS)
def test_vllm_works_and_a_request_for_msd_is_told_why_not(pair, tmp_path, fresh_process, misfit):
    module, change, message = MISFITS[misfit]
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=module, change=change))
    environment = {
        **fresh_process["env"],
        "PYTHONPATH": os.pathsep.join(
            [str(tmp_path), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    mode = "engine" if misfit == "version" else "no engine"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, pair.target, pair.draft, mode],
        **fresh_process | {"env": environment, "cwd": tmp_path},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    report = json.loads(next(x for x in lines if x.startswith("REPORT")).removeprefix("REPORT"))
    told = [line for line in (*lines, *done.stderr.splitlines()) if "MSD is off: " in line]
    assert len(told) == 1 and message in told[0], "warned once by all processes together"
    assert report["plain"] is True and report["ngram"] == report["flags"] == "ngram"
    assert report["applied"] == report["models"] == []
    assert report["hooked once"] is True
    for refusal in report["refusals"]:
        assert refusal.startswith(f"PatchError: {message}")
        assert "0.32-0.33" in refusal and "leave the speculative method 'msd' out" in refusal
    assert lines.count("EXIT 2") == 3 and done.stderr.count("error: argument --spec") == 3
    if mode == "engine":
        assert report["generated"] == 3


def test_without_engine_arguments_there_is_only_the_warning(monkeypatch):
    """A vLLM that has renamed what the hooks hold on to."""
    import vllm.engine.arg_utils as arg_utils

    from vllm_msd.vllm_plugin.patches import patching, standby

    log = mock.Mock()
    monkeypatch.setattr(standby, "_reason", None)
    monkeypatch.setattr(standby._logger, "log", log)
    monkeypatch.delattr(arg_utils, "EngineArgs")
    standby.stand_by(patching.PatchError("no such thing"))
    standby.stand_by(patching.PatchError("another thing"))
    log.assert_called_once_with(logging.WARNING, "MSD is off: %s", standby.reason())
    assert str(standby.reason()) == "no such thing"
