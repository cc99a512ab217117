"""Training data with replies of the target's own: ``vllm-msd regenerate``.

    from vllm_msd.regenerate import RegenerateSettings, regenerate

    regenerate(RegenerateSettings("in.json", "out.json", server="http://localhost:8000"))

`run` asks for every record turn by turn, `chat` talks to an OpenAI-compatible API, `own_engine` is
such an API in this process, `journal` keeps what is done until the output is written.
"""

from vllm_msd.regenerate.run import RegenerateSettings, regenerate

__all__ = ["RegenerateSettings", "regenerate"]
