"""GPU kernels, importable as ``vllm_msd.kernels``.

Each kernel lives in a file of its own with an eager twin in the same file that reads like the
definition; tests compare the two. Importing this package imports neither torch nor Triton.
"""
