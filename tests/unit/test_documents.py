"""What the documents name exists: links, paths, commands, drafts; and the linter is content."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FOLDERS = "vllm_msd|kernels|tests|examples|benchmarks|demo_factory|docs|tools"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_of_a_page_resolve(page):
    text = read(page)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in headings(target.read_text("utf-8"))):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_site_stay_in_it(page):
    if page.startswith("docs/"):
        assert "](../" not in read(page), "docs/ is built as a site: name the path instead"


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page):
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", read(page))
    named += re.findall(
        rf"(?:python|bash|^) ?((?:{FOLDERS})/[\w./-]+\.(?:py|sh))", read(page), re.M
    )
    assert not [name for name in named if not (ROOT / name).exists()]


def test_files_that_the_architecture_names_exist():
    tracked = [path.as_posix() for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    named = re.findall(r"`([\w/]+\.py)`", read("docs/architecture.md"))
    assert named
    assert not [name for name in named if not any(f.endswith(f"/{name}") for f in tracked)]


def test_every_result_file_is_on_a_page():
    pages = "".join(map(read, PAGES))
    files = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert not [name for name in files if f"benchmarks/results/{name}" not in pages]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_exist(page):
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    named = set(re.findall(r"(?:^|`|[A-Z]=\S+ )make ([a-z][\w-]*)", read(page), re.M))
    assert named <= targets


def test_modules_that_the_pages_run_exist():
    text = "".join(map(read, PAGES))
    modules = set(re.findall(rf"python -m ((?:{FOLDERS})\.[\w.]+)", text))
    assert modules
    for name in modules:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 130


@pytest.mark.parametrize("page", ["README.md", "docs/serve.md"])
def test_published_drafts_are_those_of_the_plugin(page):
    from vllm_msd.vllm_plugin.configuration.resolve import PUBLISHED_DRAFTS

    text = read(page)
    for target, draft in PUBLISHED_DRAFTS.items():
        assert f"| `{target}` | `{draft}` |" in text


def test_functions_named_as_their_modules_are_in_the_interface():
    """The site's generator shows what a package exports, but for names of its modules."""
    page = read("docs/api.md")
    missing = []
    for package in re.findall(r"^::: (vllm_msd\.\w+|kernels)$", page, re.M):
        folder = ROOT / package.replace(".", "/")
        if not folder.is_dir():
            continue
        listed = (folder / "__init__.py").read_text("utf-8").partition("__all__ = [")[2]
        for name in re.findall(r'"(\w+)"', listed.partition("]")[0]):
            is_module = (folder / name).is_dir() or (folder / f"{name}.py").is_file()
            if is_module and not re.search(rf"^::: {re.escape(package)}\..*\b{name}$", page, re.M):
                missing.append(f"{package}: {name}")
    assert not missing


def test_every_extra_and_command_is_on_the_first_page():
    from vllm_msd.cli.main import build_parser

    page = read("docs/index.md")
    extras = read("pyproject.toml").partition("[project.optional-dependencies]")[2]
    names = re.findall(r"^(\w+) = \[", extras.partition("\n[")[0], re.M)
    assert names
    assert not [name for name in names if not re.search(rf"^\| .*`{name}`.* \|", page, re.M)]
    commands = [c for action in build_parser()._actions for c in action.choices or ()]
    assert commands
    assert not [name for name in commands if f"`vllm-msd {name}" not in page]


@pytest.mark.parametrize("page", ["README.md", "docs/serve.md"])
@pytest.mark.parametrize("name", ["H100", "H200"])
def test_free_rows_are_those_of_the_roofline(page, name):
    from vllm_msd.roofline.shapes import DEVICES, free_rows

    rows = round(free_rows(DEVICES[name.lower()]), -1)
    assert f"{rows:.0f} on an {name}" in " ".join(read(page).split())


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_content(command):
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr
