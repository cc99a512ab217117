"""Entry point of the vLLM general plugin `msd`.

vLLM calls `register` in every process it starts (front end, engine core, workers, model
inspection), also where nobody asks for MSD. Such a vLLM must not fail because this package is
installed, so nothing is raised here: where MSD does not fit, vLLM stays as it is, a warning says
so, and asking for the method `msd` is the error (`patches.standby`).

An exception while this module is *imported* would be logged and swallowed, so it imports nothing.
"""


def register() -> None:
    """Register MSD with vLLM, all of it or nothing; safe to call any number of times."""
    from vllm_msd.vllm_plugin.patches import standby

    try:
        from vllm_msd.vllm_plugin import registration
        from vllm_msd.vllm_plugin.patches import ledger, patching

        patching.check_version()
        ready = patching.prepare(ledger.PATCHES)
        registration.register_models()
        patching.put_in_place(ready)
    except Exception as error:  # whatever it is: raised again when somebody asks for MSD
        standby.stand_by(error)
