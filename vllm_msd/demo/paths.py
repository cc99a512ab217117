"""Where the demo pair and its factory lie, and the cache that holds pairs made from packages."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.measure.inputs import Pair

PAIR = Path(__file__).parent / "pair"
DTYPES = ("bfloat16", "float32")
SEED = 0  # of the random weights that widening adds


def demo_pair() -> Pair:
    """The pair that comes with the package, or the one in ``$MSD_DEMO_PAIR``.

    Raises `CheckpointError` when it is not there.
    """
    return pair_in(Path(os.environ.get("MSD_DEMO_PAIR") or PAIR))


def pair_in(folder: Path) -> Pair:
    """The pair in a folder. Raises `CheckpointError` when a part of it is missing."""
    pair = Pair(folder / "target", folder / "draft")
    for path in (pair.target, pair.draft):
        if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
            raise CheckpointError(
                f"demo pair: {path} holds no config.json and model.safetensors. "
                "Install the package again, or rebuild the pair with `vllm-msd demo build`."
            )
    return pair


def use_factory() -> None:
    """Make the package `demo_factory` importable, which lies beside this one in a checkout.

    Raises `ConfigError` where it does not.
    """
    root = Path(__file__).parents[2]
    if not (root / "demo_factory" / "__init__.py").is_file():
        raise ConfigError(
            "this needs a checkout of vllm-msd's repository, installed with `pip install -e .`: "
            f"there is no demo_factory in {root}."
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))


def cache_dir() -> Path:
    """``$MSD_CACHE_DIR``, or ``vllm-msd`` in the user's cache folder (``$XDG_CACHE_HOME``)."""
    if folder := os.environ.get("MSD_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-msd"


def wide_pair(
    size: str = "350M",
    *,
    dtype: str = "bfloat16",
    pair: Pair | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Pair:
    """The demo pair widened to about ``size`` parameters (``"350M"``, ``"1B"``), made if needed.

    See `cached`; all that goes into it counts: weights, sizes, seed, algorithm.
    """
    from vllm_msd.measure import widen

    if dtype not in DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, expected one of {DTYPES}.")
    pair = pair or demo_pair()
    text = json.loads((pair.target / "config.json").read_text())["text_config"]
    shape = widen.choose_shape(
        widen.Shape.of(text), widen.parse_parameters(size), text["vocab_size"]
    )
    provenance = {
        "algorithm_version": widen.ALGORITHM_VERSION,
        "source": {name: folder_digest(Path(path)) for name, path in pair.as_dict().items()},
        "shape": asdict(shape),
        "parameters": shape.parameters(text["vocab_size"]),
        "dtype": dtype,
        "seed": SEED,
    }

    def make(new: Path) -> None:
        import torch

        report(f"widening the demo pair to {provenance['parameters'] / 1e6:.0f}M parameters")
        widen.widen_target(pair.target, new / "target", shape, getattr(torch, dtype), SEED)
        widen.widen_draft(pair.draft, new / "draft", shape, getattr(torch, dtype), SEED + 1)

    return pair_in(cached(f"wide-{size.upper()}-{dtype}", provenance, make))


def cached(name: str, provenance: dict, make: Callable[[Path], None]) -> Path:
    """The cache's folder of what ``provenance`` describes, filled by ``make`` if it is not there.

    The folder's name ends in a digest of ``provenance``, and a folder is used again only when its
    own provenance says the same. It appears by one rename, so a broken run leaves nothing behind
    and two runs at once do no harm.
    """
    digest = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_dir() / f"{name}-{digest}"
    if _provenance_of(folder) == provenance:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as making:
        new = Path(making) / folder.name
        new.mkdir()
        make(new)
        (new / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        if _provenance_of(folder) != provenance:  # else another process was faster
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    return folder


def _provenance_of(folder: Path) -> dict | None:
    path = folder / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else None


def folder_digest(folder: Path) -> str:
    """Digest of what a model folder holds: names and contents of its files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
