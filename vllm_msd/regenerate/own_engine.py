"""An engine of our own, behind the same API as a server but in this process: no port, no socket."""

import os
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx


@asynccontextmanager
async def own_engine(target: str, arguments: str) -> AsyncIterator[httpx.AsyncBaseTransport]:
    """vLLM's engine for a target, as what an `httpx.AsyncClient` sends its requests through.

    Args:
        target: folder or hub name.
        arguments: further ones of ``vllm serve``, in one string.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

    parser = make_arg_parser(FlexibleArgumentParser(prog="--engine-args"))
    args = parser.parse_args(["--model", target, *shlex.split(arguments)])
    validate_parsed_serve_args(args)
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        yield httpx.ASGITransport(app, raise_app_exceptions=False)
