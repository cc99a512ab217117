"""Models and devices in the numbers that matter here, and how many rows a step gets for nothing.

Plain Python without torch: `vllm-msd doctor` may import it.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU.

    bandwidth: bytes a second that a plain copy reads and writes, together.
    flops: operations a second of a large bf16 matrix product, as sustained, not as advertised.
    """

    name: str
    bandwidth: float
    flops: float


# H200: 4.3 TB/s is a measured copy (4.8 on paper); its large bf16 products were measured at 700 to
# 790 TFLOP/s (989 on paper), of which the lower is taken. H100 (SXM): 3.0 TB/s of 3.35 on paper.
# The matrix units of both are the same.
DEVICES = {
    "h100": Device("H100", 3.0e12, 700e12),
    "h200": Device("H200", 4.3e12, 700e12),
}


def device_named(name: str) -> Device | None:
    """The device that ``torch.cuda.get_device_name`` calls this; None for one not in `DEVICES`.

    The cards of the same names with slower memory or fewer units are others.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"pcie", "nvl"}:
        return None
    return next((device for key, device in DEVICES.items() if key in words), None)


@dataclass(frozen=True)
class Shape:
    """A target's language model; its draft is one layer of the same shape behind ``fc``.

    element_bytes: of weights, activations and KV cache. vocab: rows of the head. The embedding
    table and the vision encoder are not part of a decoding step.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head_size: int = 128
    element_bytes: int = 2

    @property
    def layer_parameters(self) -> int:
        """Weights of one decoder layer: q, k, v, o and the three matrices of the MLP."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        """Weights of the logits head."""
        return self.vocab * self.hidden

    @property
    def fc_parameters(self) -> int:
        """Weights of the draft's fusion of embedding and hidden state."""
        return 2 * self.hidden**2

    @property
    def step_parameters(self) -> int:
        """Weights that a decoding step of the target reads."""
        return self.layers * self.layer_parameters + self.head_parameters

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in one layer, bytes."""
        return 2 * self.kv_heads * self.head_size * self.element_bytes


# From the models' public config.json; Vicuna's 32000 words and 64 more in the -hf conversions.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5-7b", 4096, 32, 32, 32, 11008, 32064),
        Shape("llava-1.5-13b", 5120, 40, 40, 40, 13824, 32064),
        Shape("qwen2-vl-7b", 3584, 28, 28, 4, 18944, 152064),
    )
}


def free_rows(device: Device, element_bytes: int = 2) -> float:
    """Rows of a step (all requests together) up to which reading the weights takes longest.

    A row takes 2 operations a weight, a weight ``element_bytes``. Below this count more rows cost
    next to nothing, beyond it each costs its share of the matrix products: a tree should shrink so
    that ``(nodes + 1) * batch`` stays below. The model's size does not matter, only its type does.
    """
    return element_bytes / device.bandwidth / (2 / device.flops)
