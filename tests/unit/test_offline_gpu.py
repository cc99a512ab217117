"""tools/offline_gpu: its scripts parse, unpack what they pack, and use names that exist.

Not covered: anything that needs a GPU, and the downloads of `prepare.sh`. It is one long file since
all of it is about one folder, whose scripts nothing else imports.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

KIT = Path(__file__).parents[2] / "tools" / "offline_gpu"
SCRIPTS = ("answer", "bench_gpu", "collect", "engines", "kit_shims", "no_c", "slim", "smoke")
SHELL = ("prepare.sh", "unpack.sh")


@pytest.fixture
def load(monkeypatch):
    """Import a script of the folder by its name, as it is imported there."""
    monkeypatch.syspath_prepend(str(KIT))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, KIT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter: vLLM is not loaded, nothing that happens stays."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=KIT, env={**os.environ, **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_folder_holds_what_is_tested_here():
    files = {path.name for path in KIT.iterdir() if path.is_file()}
    expected = {f"{name}.py" for name in SCRIPTS} | {*SHELL, "README.md", "requirements.txt"}
    assert files == expected
    readme = (KIT / "README.md").read_text()
    for name in files - {"README.md"}:
        assert f"`{name}`" in readme, name


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_parse(name):
    done = subprocess.run(["bash", "-n", KIT / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_of_the_readme_parse_and_name_what_exists():
    root = KIT.parents[1]
    blocks = re.findall(r"```bash\n(.*?)```", (KIT / "README.md").read_text(), re.S)
    assert len(blocks) >= 5
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for path in re.findall(r"(?:tools|benchmarks|tests)/[\w/.]+", block):
            assert (root / path).exists(), path
        for module in re.findall(r"python3 -m ([\w.]+)", block):
            assert importlib.util.find_spec(module), module


def test_requirements_are_pinned():
    lines = (KIT / "requirements.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in packages)


# What the scripts use of this package and of vLLM ------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_imported_names_exist(name):
    """Everything that a script imports, also inside functions that only run on a GPU."""
    pytest.importorskip("vllm")
    checked = 0
    for node in ast.walk(ast.parse((KIT / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("vllm", "vllm_msd"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                # A submodule need not be loaded: some want a GPU.
                found = hasattr(module, alias.name) or importlib.util.find_spec(
                    f"{node.module}.{alias.name}"
                )
                assert found, f"{node.module} has no {alias.name}"
                checked += 1
    assert checked or name in ("answer", "collect", "no_c", "slim", "engines")


def test_answering_engines_share_the_prompts_and_are_given_what_they_need(load, tmp_path):
    from vllm_msd.cli.main import build_parser  # what `vllm-msd regenerate` takes

    load("engines")
    answer = load("answer")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"id": n} for n in range(7)]))
    args = SimpleNamespace(
        target="T", prompts=prompts, folder=tmp_path / "f", engines=3, requests=40, gib=0.5,
        mode="graphs", max_model_len=128,
    )  # fmt: skip
    todo = answer.commands(args, ["--samples", "2"])
    found = [build_parser().parse_args(command[3:]) for command in todo]
    parts = [json.loads(Path(one.data).read_text()) for one in found]
    assert sorted(row["id"] for part in parts for row in part) == list(range(7))
    assert len({one.output for one in found}) == 3 and found[0].samples == 2
    words = shlex.split(found[0].engine_args)
    graphs = json.loads(words[words.index("--compilation-config") + 1])
    assert graphs["cudagraph_capture_sizes"] == [1, 2, 4, 8, 16, 32, 40]
    assert words[words.index("--max-num-seqs") + 1] == "40" and "--enforce-eager" not in words


def test_modules_of_the_smoke_test_exist(load):
    pytest.importorskip("vllm")
    smoke = load("smoke")
    missing = [module for module in smoke.MODULES if importlib.util.find_spec(module) is None]
    assert not missing


def test_what_the_shims_replace_exists():
    pytest.importorskip("vllm")
    done = python("-c", SHIMS)
    assert done.returncode == 0, done.stdout + done.stderr


SHIMS = """
import sys, types
import kit_shims
sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("library"))  # CUDA builds only
from vllm.platforms import cuda, current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils import torch_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backend
from vllm.v1.worker.gpu import buffer_utils

hopper = DeviceCapability(9, 0)
cuda.CudaPlatformBase.get_device_capability = classmethod(lambda cls, device_id=0: hopper)
kit_shims.apply()
assert current_platform.is_cuda() or not hasattr(cuda, "_kit_priorities")

before = cuda.CudaPlatformBase.get_supported_vit_attn_backends()
assert {Backend.FLASH_ATTN, Backend.TORCH_SDPA} <= {*before} and before[0] != Backend.TORCH_SDPA
cuda._get_backend_priorities = lambda *_, **__: [Backend.FLASHINFER, Backend.TRITON_ATTN]
for _ in range(2):  # vLLM may load its plugins twice in a process
    kit_shims.leave_out_missing_backends()
    assert cuda._get_backend_priorities(1, x=2) == [Backend.TRITON_ATTN]
    after = cuda.CudaPlatformBase.get_supported_vit_attn_backends()
    assert after[0] == Backend.TORCH_SDPA and Backend.FLASH_ATTN not in after
    assert after.count(Backend.TORCH_SDPA) == 1

assert callable(buffer_utils.is_uva_available) and callable(torch_utils.weak_ref_tensor)
kit_shims.leave_out_native_code()
assert buffer_utils.is_uva_available() is False and torch_utils.weak_ref_tensor(7) == 7
"""


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("no_c", ["0", "1"])
def test_options_are_arguments_of_vllm(load, monkeypatch, gpu, no_c):
    pytest.importorskip("vllm")
    from vllm import EngineArgs
    from vllm.config import CompilationConfig, KernelConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def names(cls):
        return {field.name for field in dataclasses.fields(cls)}

    engines = load("engines")
    monkeypatch.setenv("KIT_NO_C", no_c)
    monkeypatch.setattr(engines.torch.cuda, "is_available", lambda: gpu)
    for mode in engines.MODES:
        found = engines.options(mode, requests=12, rows=25, gib=2)
        assert {*found} <= names(EngineArgs)
        assert {*found.get("kernel_config", {})} <= names(KernelConfig)
        compilation = found.get("compilation_config", {})
        assert {*compilation} <= names(CompilationConfig)
        assert found["enforce_eager"] == (mode == "eager")
        assert found["max_num_seqs"] == 12 and found["kv_cache_memory_bytes"] == 2 * 2**30
        assert ("attention_backend" in found) == gpu
        if gpu:
            assert found["attention_backend"] in AttentionBackendEnum.__members__
            assert found["mm_encoder_attn_backend"] in AttentionBackendEnum.__members__
        assert ("custom_ops" in compilation) == (no_c == "1")
        if mode == "graphs":
            sizes = compilation["cudagraph_capture_sizes"]
            assert sizes == [25 * n for n in (1, 2, 4, 8, 12)]


def test_operations_in_the_place_of_the_native_library():
    done = python("-c", NO_C)
    assert done.returncode == 0, done.stdout + done.stderr


NO_C = """
import no_c, torch
x = torch.randn(3, 8)
gate, up = x[:, :4], x[:, 4:]
for name, given, expected in (
    ("silu_and_mul", x, gate * gate.sigmoid() * up),
    ("gelu_and_mul", x, torch.nn.functional.gelu(gate) * up),
    ("gelu_quick", x, x * (1.702 * x).sigmoid()),
    ("gelu_new", x, torch.nn.functional.gelu(x, approximate="tanh")),
    ("gelu_fast", x, torch.nn.functional.gelu(x, approximate="tanh")),
):
    out = torch.full_like(expected, float("nan"))
    getattr(torch.ops._C, name)(out, given)
    torch.testing.assert_close(out, expected)
assert torch.ops._C.cutlass_scaled_mm_supports_fp8(90) is False
"""


# Making the kit ----------------------------------------------------------------------------------


def entry(kind: int, arch: int, code: bytes) -> bytes:
    """One GPU's code as it lies in a fat binary."""
    header = struct.pack("<HHIQ", kind, 1, 64, len(code)).ljust(28, b"\0")
    return (header + struct.pack("<I", arch)).ljust(64, b"\0") + code


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_slim_keeps_one_gpu(load, tmp_path):
    slim = load("slim")
    wanted = entry(2, 90, b"hopper" * 9)
    both = fat_binary(entry(2, 80, b"ampere" * 20), wanted, entry(1, 90, b"ptx"))
    other = fat_binary(entry(1, 100, b"p" * 8), entry(2, 100, b"blackwell" * 5))
    source = tmp_path / "in.so"
    source.write_bytes(b"ELF..." + both + b"between" + other + b"end")
    target = tmp_path / "new" / "out.so"
    done = python("slim.py", str(source), str(target))
    assert done.returncode == 0 and "1 of 2 files have none" in done.stdout
    data = target.read_bytes()
    assert len(data) == source.stat().st_size and data.startswith(b"ELF...")
    at = len(b"ELF...")
    assert data[at : at + 16 + len(wanted)] == fat_binary(wanted)
    assert not any(data[at + 16 + len(wanted) : at + len(both)])  # zeros
    at += len(both) + len(b"between")
    (rest,) = slim.entries(data, at + 16, at + 16 + slim.HEADER.unpack_from(data, at)[3])
    assert rest.arch == 100 and rest.kind == 2 and not any(rest.data[rest.header :])
    assert data.endswith(b"end") and b"between" in data and b"ampere" not in data


def test_slim_refuses_what_it_cannot_read(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(fat_binary(entry(2, 90, b"x" * 8))[:-4] + bytes(200))
    broken.write_bytes(struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 70) + entry(2, 90, b"x" * 8))
    done = python("slim.py", str(broken), str(tmp_path / "out.so"))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert not (tmp_path / "out.so").exists()


def wheel(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_collect(load, tmp_path):
    collect = load("collect")
    files = {
        "vllm/__init__.py": "", "vllm/_C.abi3.so": "large", collect.LIBRARY: "library",
        collect.FLASH: "flash", "vllm/third_party/deep_gemm/x.py": "",
        collect.FLASH_INIT: f"{collect.FLASH_CHECK}\n    raise ImportError",
    }  # fmt: skip
    vllm = wheel(tmp_path / "vllm.whl", **files)
    other = wheel(
        tmp_path / "other.whl", **{"other/_x.so": "small", "mistral_common/data/v.json": "large"}
    )
    collect.collect(vllm, [other], tmp_path / "work")
    site = tmp_path / "work" / "site"
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert found == {
        "vllm/__init__.py", collect.FLASH_INIT, "other/_x.so",
        "kit_shims-1.dist-info/METADATA", "kit_shims-1.dist-info/entry_points.txt",
    }  # fmt: skip
    exec((site / collect.FLASH_INIT).read_text(), {})
    assert (tmp_path / "work" / "native" / collect.FLASH).read_text() == "flash"
    plugins = (site / "kit_shims-1.dist-info/entry_points.txt").read_text()
    module, _, function = plugins.strip().rpartition("= ")[2].partition(":")
    assert callable(getattr(load(module), function))

    changed = wheel(tmp_path / "changed.whl", **files | {collect.FLASH_INIT: "other"})
    with pytest.raises(ValueError, match="no longer says"):
        collect.collect(changed, [], tmp_path / "again")
    with pytest.raises(ValueError, match="lacks"):
        collect.collect(other, [], tmp_path / "once more")


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the folder in it, and a packed kit of two files as `prepare.sh` keeps it."""
    root = tmp_path / "checkout"
    (root / "tools").mkdir(parents=True)
    (root / "tools" / "offline_gpu").symlink_to(KIT)
    (root / ".gitignore").write_text(".kit/\n.cache/\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    work = root / ".cache" / "offline_gpu"
    work.mkdir(parents=True)
    for name, member in (("main", "vllm/_C_stable_libtorch.abi3.so"), ("flash", "vllm/flash.so")):
        file = tmp_path / "files" / member
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(3 * 2**20))  # packs to what it is
        with tarfile.open(work / f"{name}.tar.xz", "w:xz", preset=0) as archive:
            archive.add(file, member)
    (work / "packed").touch()
    return root


def bash(checkout: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    (checkout / "kit").mkdir(exist_ok=True)
    (checkout / "kit" / "installed").touch()  # this test's interpreter keeps its own packages
    environment = {**os.environ, "KIT": str(checkout / "kit"), **environment}
    return subprocess.run(
        ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True
    )


PREPARE = "bash tools/offline_gpu/prepare.sh"
UNPACK = ". tools/offline_gpu/unpack.sh"


def test_what_is_prepared_can_be_unpacked(checkout):
    made = bash(checkout, PREPARE)
    assert made.returncode == 0, made.stderr
    assert re.search(r"\.kit/part0 +3\.\d MiB", made.stdout) and "note" not in made.stdout
    parts = [path.name for path in sorted((checkout / ".kit").iterdir())]
    assert parts == ["flash", "part0"]

    done = bash(checkout, f"{UNPACK}; echo $PYTHONPATH")
    assert done.stdout.splitlines() == [str(checkout / "kit" / "site")], done.stderr
    site = checkout / "kit" / "site" / "vllm"
    library = site / "_C_stable_libtorch.abi3.so"
    original = checkout.parent / "files" / "vllm" / library.name
    assert library.read_bytes() == original.read_bytes() and (site / "flash.so").is_file()
    assert (site.parent / "kit_shims.py").is_file()

    bash(checkout, UNPACK, KIT_NO_C="1")
    stand_in = site / "_C_stable_libtorch.py"
    assert not library.exists() and "silu_and_mul" in stand_in.read_text()
    bash(checkout, UNPACK)
    assert library.is_file() and not stand_in.exists()


def test_a_kit_in_parts_waits_for_the_last(checkout):
    (checkout / "large").write_bytes(bytes(4 * 2**20))
    assert "leaves too little" in bash(checkout, PREPARE, KIT_LIMIT_MIB="8").stderr
    # Less than 5 MiB are left, and the archive is larger than that.
    work = checkout / ".cache" / "offline_gpu"
    file = checkout.parent / "files" / "more"
    file.write_bytes(os.urandom(6 * 2**20))
    with tarfile.open(work / "main.tar.xz", "w:xz", preset=0) as archive:
        archive.add(file, "vllm/more")
    made = bash(checkout, PREPARE, KIT_LIMIT_MIB="10")
    assert made.returncode == 0 and "needs 2 loads" in made.stdout, made.stderr
    parts = [checkout / ".kit" / f"part{number}" for number in range(2)]
    away = checkout / "away"
    parts[1].rename(away)
    first = bash(checkout, UNPACK)
    assert first.stdout.splitlines() == ["kit: not complete, 1 of 2 parts are there"]
    parts[0].rename(checkout / "gone")
    away.rename(parts[1])
    assert bash(checkout, UNPACK).stdout == ""
    assert (checkout / "kit" / "site" / "vllm" / "more").read_bytes() == file.read_bytes()


def test_a_damaged_part_is_not_unpacked(checkout):
    bash(checkout, PREPARE)
    part = checkout / ".kit" / "part0" / "main.0"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    done = bash(checkout, UNPACK)
    assert "main.tar.xz: FAILED" in done.stdout and "not complete" in done.stdout
    assert not (checkout / "kit" / "site" / "vllm" / "_C_stable_libtorch.abi3.so").exists()


# Measuring ---------------------------------------------------------------------------------------


class FakeEngine:
    """Emits two tokens a request and step, one of them drafted; request n ends after n + 1 steps"""

    def __init__(self):
        self.llm, self._record, self.left, self.most = self, self, {}, 0
        self.last, self.renderer = None, SimpleNamespace(render_cmpl=list)

    def add_request(self, request_id, prompt, params):
        assert params.temperature == 0
        self.left[request_id] = int(prompt) + 1

    def step(self):
        self.most = max(self.most, len(self.left))
        outputs = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            finished = self.left[request_id] == 0
            if finished:
                del self.left[request_id]
            outputs.append(SimpleNamespace(
                request_id=request_id, finished=finished,
                outputs=[SimpleNamespace(token_ids=[int(request_id), 7])],
            ))  # fmt: skip
        self.last = SimpleNamespace(num_drafts=len(outputs), num_accepted_tokens=len(outputs))
        return outputs

    def take(self):
        last, self.last = self.last, None
        return last


def test_bench_keeps_the_batch_full(load, monkeypatch):
    pytest.importorskip("vllm")
    bench, engine = load("bench_gpu"), FakeEngine()
    monkeypatch.setattr(bench, "READ", 1)
    served = bench.serve(engine, [0, 1, 2, 3, 4], 2, 16)
    assert served.ids == {n: [n, 7] * (n + 1) for n in range(5)}
    assert (engine.most, served.tokens) == (2, 30)
    # Requests 0 and 1, 1 and 2, 2 and 3, 2 and 3, 3 and 4, 3 and 4; then 4 alone for three steps.
    # In two of the six that are full no request is new.
    assert len(served.steps) == 2
    assert served.verifications == served.accepted == 15
    figures = served.figures()
    assert figures["tokens_per_verification"] == 2.0
    assert figures["tokens_per_second"] == pytest.approx(30 / served.seconds, rel=1e-3)
    assert bench.Served({0: [1]}, seconds=1.0).figures()["tokens_per_verification"] is None


def test_bench_compares_with_no_speculation(load, monkeypatch):
    pytest.importorskip("vllm")
    bench = load("bench_gpu")
    monkeypatch.setattr(bench, "held_out_samples", lambda count: [*range(count)])
    seconds = {bench.NONE: 4.0, "chain 5": 1.0}

    def serve(engine, prompts, batch, max_tokens):
        ids = {n: [n, n] for n in range(len(prompts))}
        if engine.name != bench.NONE:
            ids[3] = [3, 4]
        return bench.Served(ids, [0.1], seconds[engine.name])

    monkeypatch.setattr(bench, "serve", serve)
    engines = {name: SimpleNamespace(name=name, prompt=lambda one: one) for name in seconds}
    args = SimpleNamespace(batches=[1, 8], rounds=2, max_tokens=4)
    rows = []
    assert len([*bench.compare(engines, args, rows)]) == 2
    assert [(row["batch"], row["drafted"]) for row in rows] == [
        (1, bench.NONE), (1, "chain 5"), (8, bench.NONE), (8, "chain 5")
    ]  # fmt: skip
    assert [row["speedup"] for row in rows] == [1.0, 4.0] * 2
    assert [row["requests"] for row in rows] == [14, 14, 24, 24]
    assert [row["identical"] for row in rows] == [14, 13, 24, 23]


def test_smoke_compares_accepted_drafts_with_the_eager_stage(load, tmp_path):
    smoke = load("smoke")
    eager = tmp_path / "smoke_eager.json"
    now = {"none": {}, "chain": {"acceptance_length": 4.0}, "tree": {"acceptance_length": 5.0}}
    assert smoke.accepts_as_eager(now, eager)  # nothing to compare with
    eager.write_text(json.dumps({"arms": now}))
    assert smoke.accepts_as_eager(now, eager)
    now["tree"]["acceptance_length"] = 4.7
    assert not smoke.accepts_as_eager(now, eager)


def test_sums_are_of_the_files(checkout):
    bash(checkout, PREPARE)
    sums = (checkout / ".kit" / "flash" / "flash.sha256").read_text().split()
    data = (checkout / ".kit" / "flash" / "flash.tar.xz").read_bytes()
    assert sums == [hashlib.sha256(data).hexdigest(), "flash.tar.xz"]
