"""Entry point of the vLLM general plugin `msd`.

vLLM calls `register` in every process it starts (front end, engine core, workers, model
inspection). An exception while this module is *imported* would be logged and swallowed, so it
imports nothing; everything that can fail happens inside the call and is loud.
"""


def register() -> None:
    """Register MSD with vLLM; safe to call any number of times.

    Raises:
        PatchError: vLLM's version is not supported or a patch point has changed.
    """
    from vllm_msd.vllm_plugin import registration
    from vllm_msd.vllm_plugin.patches import ledger, patching

    patching.check_version()
    registration.register_models()
    patching.apply_all(ledger.PATCHES)
