"""The k most probable tokens of every row of logits: eager twin, Triton kernels, public calls."""
