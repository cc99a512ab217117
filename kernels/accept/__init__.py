"""The walk that accepts a path of every token tree: eager twin, Triton kernel, public call."""
