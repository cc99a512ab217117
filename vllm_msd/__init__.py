"""Multimodal Speculative Decoding (MSD, arXiv 2505.14260) for vLLM.

Importing this package imports nothing else: the plugin entry point and the start-up hook run in
every Python process of an environment and must cost nothing there.
"""

__version__ = "0.1.0"
