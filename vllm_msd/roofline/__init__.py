"""Step times by arithmetic: bytes, operations and launches of a serving step, no GPU needed.

`shapes` holds models, devices and the rule how many rows are free, `launches` how often a step
starts a kernel, `step` the prediction, `scratch` what drafting and verification need of memory.
Operations are multiplications plus additions, times are seconds. A prediction is a bound from below
and no measurement: of all the numbers only the H200's two rates were measured.
"""
