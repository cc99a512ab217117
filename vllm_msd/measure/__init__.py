"""Measuring: an engine watched step by step, the same requests with and without drafts, their cost.

Knows neither the demo's pair nor its samples: whoever measures brings both (see `inputs`).
"""
