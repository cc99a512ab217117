"""The CPU way, Model Runner V1: for trying MSD, for tests and for CI on any machine.

What people serve with is the GPU way in `vllm_plugin/gpu`. Everything here gives the same answers
through vLLM's CPU runner: drafters of chains and of trees, a runner that verifies trees, tree
attention as ordinary paged attention over root-to-leaf paths in scratch blocks, and mends of
vLLM's sampling on the CPU.
"""
