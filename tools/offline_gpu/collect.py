"""Lay vLLM and the packages it needs into one folder: python collect.py VLLM_WHEEL WHEELS TARGET

TARGET/site gets what goes on the other machine's PYTHONPATH, without native libraries, the parts
of vLLM that this path does not use, and large data; TARGET/native gets the two libraries that are
worth bringing, for slim.py. Two changes make it run there: vLLM's flash attention may lack its
library, and kit_shims is announced as a plugin of vLLM.
"""

import argparse
import sys
import zipfile
from pathlib import Path

LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
FLASH = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
# Kernels of other GPUs and models, the HTTP server's pictures, vLLM's front end in Rust.
LEFT_OUT = (
    "vllm/vllm-rs",
    "vllm/third_party/deep_gemm/",
    "vllm/third_party/fmha_sm100/",
    "vllm/third_party/tml_fa4/",
    "vllm/entrypoints/serve/instrumentator/static/",
)
UNREAD_DATA = ("mistral_common/data/", "pycountry/locales/")
# Model files import flash attention's Python side whatever the backend is.
FLASH_INIT = "vllm/vllm_flash_attn/__init__.py"
FLASH_CHECK = "if not (FA2_AVAILABLE or FA3_AVAILABLE):"


def collect(vllm_wheel: Path, wheels: list[Path], target: Path) -> None:
    """Fill ``target``; ValueError where vLLM's wheel is not as expected."""
    site, native = target / "site", target / "native"
    with zipfile.ZipFile(vllm_wheel) as archive:
        names = archive.namelist()
        if missing := {LIBRARY, FLASH, FLASH_INIT} - {*names}:
            raise ValueError(f"{vllm_wheel.name} lacks {', '.join(sorted(missing))}")
        for name in names:
            if not name.endswith(".so") and not name.startswith(LEFT_OUT):
                archive.extract(name, site)
        for name in (LIBRARY, FLASH):
            archive.extract(name, native)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.startswith(UNREAD_DATA):
                    archive.extract(name, site)
    text = (site / FLASH_INIT).read_text()
    if FLASH_CHECK not in text:
        raise ValueError(f"{FLASH_INIT} of {vllm_wheel.name} no longer says {FLASH_CHECK!r}")
    (site / FLASH_INIT).write_text(text.replace(FLASH_CHECK, "if False:  # may come later"))
    info = site / "kit_shims-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kit_shims\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkit_shims = kit_shims:apply\n")


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vllm_wheel", type=Path)
    parser.add_argument("wheels", type=Path, help="folder with the other packages' wheels")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        collect(args.vllm_wheel, sorted(args.wheels.glob("*.whl")), args.target)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
