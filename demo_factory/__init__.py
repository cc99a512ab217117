"""Where the demo's pair comes from: a procedural world, the target's training, data, evaluation.

Runs from a checkout only: `vllm-msd demo build`, `vllm-msd demo data`, and in the checkout's root
``python -m demo_factory.evaluate`` and its like. The package itself carries the finished pair and a
fixed set of held-out samples.
"""
