"""What several files share: one server under MSD, the tiny pairs, the registered plugin."""

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


@pytest.fixture(scope="session")
def registered():
    """The plugin in this process, as vLLM loads it into its own."""
    from vllm_msd.vllm_plugin import plugin

    plugin.register()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A tiny pair of each kind of target."""
    from tests.common import tiny

    root = tmp_path_factory.mktemp("pairs")
    return {kind: tiny.build_pair(root / kind, kind) for kind in tiny.KINDS}


@pytest.fixture(scope="session")
def pair(pairs):
    return pairs["llava"]
