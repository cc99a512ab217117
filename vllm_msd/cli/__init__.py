"""The ``vllm-msd`` command line."""
