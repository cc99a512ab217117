"""What the wheels hold, what the installed package announces, and how the command line behaves."""

import base64
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vllm_msd
from vllm_msd.cli import main as cli
from vllm_msd.errors import MSDError

ROOT = Path(__file__).parents[2]
LIMIT_BYTES = 1_000_000
HEAVY = {"torch", "transformers", "vllm", "numpy", "PIL"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a build reads: building leaves traces in the source folder."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vllm_msd_startup.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("vllm_msd", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    weights = folder / "vllm_msd" / "demo" / "pair" / "target" / "model.safetensors"
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def wheel(request, source, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    program = f"import setuptools.build_meta as b; b.{request.param}({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (path,) = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_start_up_hook_lies_at_the_top_of_both_wheels(wheel):
    hook = "vllm_msd_startup.pth"
    content = wheel.read(hook)
    (line,) = content.decode().splitlines()
    assert line.startswith("import "), "site executes no other lines"
    editable = "editable" in Path(wheel.filename).name
    assert f"'from_checkout': {editable}}}" in line and "torch/version.py" in line
    compile(line, hook, "exec")
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (record,) = (name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
    lines = wheel.read(record).decode().splitlines()
    assert f"{hook},sha256={digest},{len(content)}" in lines
    assert len(lines) == len(set(wheel.namelist())) == len(wheel.namelist())


@pytest.mark.parametrize("wheel", ["build_wheel"], indirect=True)
def test_wheel_holds_every_package_and_the_demo_pair(wheel):
    names = set(wheel.namelist())
    for package in ("vllm_msd", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            inside = f"vllm_msd/{inside}" if package == "kernels" else inside
            assert inside in names, "does its folder have an __init__.py?"
    assert "vllm_msd/demo/pair/target/model.safetensors" in names
    assert "vllm_msd/demo/report/template.html" in names
    assert {"vllm_msd/measure/report/style.css", "vllm_msd/bench/template.html"} <= names
    samples = (ROOT / "vllm_msd/demo/pair/samples").iterdir()
    assert {path.relative_to(ROOT).as_posix() for path in samples} <= names
    inside = {name.split("/")[0].split("-")[0] for name in names}
    assert inside == {"vllm_msd", "vllm_msd_startup.pth"}, "neither tests nor the demo's factory"


@pytest.mark.parametrize("wheel", ["build_wheel"], indirect=True)
def test_wheel_is_small_without_the_weights(wheel):
    weights = [one for one in wheel.infolist() if one.filename.endswith("model.safetensors")]
    size = Path(wheel.filename).stat().st_size - sum(one.compress_size for one in weights)
    assert size < LIMIT_BYTES


def test_installed_package_announces_plugin_and_extras():
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="msd")
    assert {point.value for point in points} == {"vllm_msd.vllm_plugin.plugin:register"}
    metadata = importlib.metadata.metadata("vllm-msd")
    assert {"gpu", "cpu", "bench", "train", "completion", "test"} <= set(
        metadata.get_all("Provides-Extra")
    )
    assert metadata["Version"] == vllm_msd.__version__


def test_kernels_folder_is_a_subpackage():
    import vllm_msd.kernels

    assert Path(vllm_msd.kernels.__file__).parent == ROOT / "kernels"


def test_command_line_is_light_until_a_command_runs():
    program = (
        "import sys; from vllm_msd.cli.main import build_parser; build_parser(); "
        f"print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for command in ("doctor", "convert", "inspect", "demo"):
        assert f"\n    {command} " in shown


def test_version_names_what_is_installed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    told = dict(part.split() for part in capsys.readouterr().out.strip().split(", "))
    assert told["vllm-msd"] == vllm_msd.__version__
    assert told["torch"] == importlib.metadata.version("torch") and "vllm" in told


def test_bash_completes_commands(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + (
        "COMP_WORDS=(vllm-msd doc); COMP_CWORD=1\n"
        "$(complete -p vllm-msd | sed 's/.*-F \\([^ ]*\\) .*/\\1/') vllm-msd doc vllm-msd\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    assert done.stdout.strip() == "doctor", done.stderr


def test_completion_without_shtab_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "zsh"]) == 2
    assert "vllm-msd[completion]" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch):
    """Makes every command raise the given error."""

    def arrange(error):
        def fail(args):
            raise error

        def add_parsers(subparsers):
            subparsers.add_parser("fail").set_defaults(func=fail)

        monkeypatch.setattr(cli, "COMMAND_MODULES", ("doctor",))
        monkeypatch.setattr("vllm_msd.cli.doctor.add_parsers", add_parsers)

    return arrange


def test_a_users_mistake_exits_2_without_a_traceback(failing, capsys):
    failing(MSDError("got a, expected b"))
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == "vllm-msd: error: got a, expected b\n"


def test_a_missing_vllm_is_told_with_both_ways_out(failing, capsys):
    failing(ModuleNotFoundError("No module named 'vllm'", name="vllm"))
    assert cli.main(["fail"]) == 2
    told = capsys.readouterr().err
    assert "vLLM is not installed" in told
    assert "vllm-msd[gpu]" in told and "vllm-msd[cpu]" in told


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'x'", name="x"), KeyError("bug")]
)
def test_a_bug_keeps_its_traceback(failing, error):
    failing(error)
    with pytest.raises(type(error)):
        cli.main(["fail"])


def test_the_plugin_tells_that_vllm_is_missing(monkeypatch):
    from vllm_msd.vllm_plugin.patches import patching

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(patching.PatchError, match=r"not installed.*vllm-msd\[cpu\]"):
        patching.vllm_version()
