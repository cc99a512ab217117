"""Errors that a user can cause and can mend.

Every message says what was got, what was expected and what to do. Command lines print the message
and exit 2 without a traceback. They derive from ``ValueError`` so that vLLM's own argument handling
reports them like its own.
"""


class MSDError(ValueError):
    """Base of all errors that a user can mend."""


class ConfigError(MSDError):
    """A configuration (of a draft, an engine or a training run) is not usable."""


class CheckpointError(MSDError):
    """A checkpoint is missing, unreadable, incomplete, or does not fit its target."""


class DataError(MSDError):
    """Training data is malformed, or too much of it is broken."""


class StorageError(MSDError):
    """A file or folder cannot be read or written: a full disk, missing rights, a wrong place."""


VLLM_MISSING = (
    "vLLM is not installed. Install it together with this package: "
    'pip install "vllm-msd[gpu]" for a machine with an accelerator, '
    'pip install "vllm-msd[cpu]" for one without.'
)
TRAINING_MISSING = (
    "{name} is not installed, which training needs. Install it together with this package: "
    'pip install "vllm-msd[train]".'
)
