"""One level of a growing draft tree: eager twin, Triton kernel, public call."""
