"""The best candidates of a grown tree as its nodes: eager twin, Triton kernel, public call."""
