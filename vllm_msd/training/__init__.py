"""Training an MSD draft: losses, curriculum, feature noise, unrolled drafting, a first loop.

`losses`, `curriculum` and `unroll` are plain PyTorch; `features` runs the target.
"""
