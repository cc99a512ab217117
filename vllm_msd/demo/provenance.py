"""The demo's figures say what they were measured on, by `vllm_msd.provenance`."""

from vllm_msd.provenance import command_line, machine, provenance, versions

__all__ = ["command_line", "machine", "provenance", "versions"]
