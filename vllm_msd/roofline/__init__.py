"""Step times by arithmetic: bytes, operations and launches of a serving step, no GPU needed.

`shapes` holds models, devices and the rule how many rows are free, `launches` how often a step
starts a kernel, `step` the prediction, `scratch` what drafting and verification need of memory.
Bytes are bytes, operations are multiplications plus additions, times are seconds. Nothing here is
measured but the two bandwidths; a prediction is a bound from below.
"""
