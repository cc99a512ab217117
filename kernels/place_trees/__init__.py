"""Laying stored trees over the rows of a target's pass: eager twin, Triton kernel, public call."""
