"""`vllm-msd bench`: one model without speculation, with vLLM's ngram, and with MSD, in one run.

``settings.py`` and ``arms.py`` say what is compared, ``data.py`` on which requests; ``drive.py``
answers a batch of them and takes the times; ``run.py`` goes through all cells in turn and can go on
after a kill, if ``origin.py`` finds the same requests and models; ``ties.py`` looks at answers that
differ; ``ideal.py`` sets the measured speed beside what the acceptance allows; ``figures.py`` makes
numbers of it, ``charts.py`` and ``report.py`` pictures and a page. Random weights of a published
model's shape come from ``true_shapes.py``, and ``replay.py`` accepts for them.
"""
