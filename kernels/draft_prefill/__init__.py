"""The draft's rows along accepted paths: eager twin, Triton kernel, public call."""
