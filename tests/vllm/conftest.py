"""One server under MSD for all tests that need one."""

import os

import pytest

# Of a process without an engine in it: vLLM changes both when it starts one in this process.
FRESH_ENVIRONMENT = dict(os.environ)
ALL_CORES = os.sched_getaffinity(0)


@pytest.fixture(scope="session")
def fresh_process():
    """Keyword arguments for `subprocess` that undo what an engine in this process changed."""
    return {
        "env": dict(FRESH_ENVIRONMENT),
        "preexec_fn": lambda: os.sched_setaffinity(0, ALL_CORES),
    }


@pytest.fixture(scope="session")
def msd_server(tmp_path_factory):
    """The demo pair behind ``vllm serve`` with MSD, fp32."""
    from tests.common.server import start_server

    server = start_server(tmp_path_factory.mktemp("server"), FRESH_ENVIRONMENT, ALL_CORES)
    yield server
    server.stop()
