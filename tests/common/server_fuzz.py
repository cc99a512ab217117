"""Request bodies that nobody means, for the server's two ways of asking."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import urllib.error
import urllib.request
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from tests.common.server import Server
from tests.common.worker import HANGS

PLACEHOLDER = "<image>"
_text = st.text(max_size=10) | st.sampled_from(
    [
        "",
        " ",
        PLACEHOLDER,
        PLACEHOLDER * 3,
        "<s></s>",
        "\0",
        "\ud83d",
        "word " * 3000,
        "auto",
        "json",
    ]
)
_numbers = st.sampled_from(
    [0, -1, 1, 2, 8, 0.0, 0.5, 1.0, -0.5, 1e-9, 1e38, 1e400, math.nan, -math.inf, 2**31, 2**63,
     -(2**63) - 1, 319, 1024, 1025, 2048, 2049, 32000]
)  # fmt: skip
junk = st.recursive(
    st.none() | st.booleans() | _numbers | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=2),
    max_leaves=4,
)
_ids = st.integers(-2, 2100) | st.sampled_from([2**31, 2**63, 10**30])
_bias = st.dictionaries(_ids.map(str) | _text, _numbers, max_size=3)
_schema = st.sampled_from(
    [
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        {"type": "nonsense"},
        {"type": "array", "items": {"$ref": "#/none"}},
        {},
        "no schema",
    ]
)
_rule = st.fixed_dictionaries(
    {},
    optional={
        "regex": st.sampled_from(["[a-z]{2}", "(", "", "a" * 2000, "(?=a)"]) | junk,
        "choice": st.lists(_text, max_size=3) | junk,
        "json": _schema | junk,
        "grammar": _text | junk,
        "json_object": junk,
    },
)
# Odd but mostly well-formed values. Samples and tokens stay few enough to be answered at once.
_ODD: dict[str, st.SearchStrategy] = {
    "n": st.integers(-1, 4),
    "max_tokens": st.integers(-1, 12) | st.just(2**40),
    "min_tokens": st.integers(-1, 20),
    "temperature": _numbers,
    "top_p": _numbers,
    "top_k": _numbers,
    "min_p": _numbers,
    "seed": st.integers() | _numbers,
    "presence_penalty": _numbers,
    "frequency_penalty": _numbers,
    "repetition_penalty": _numbers,
    "logprobs": st.integers(-2, 25) | st.booleans() | st.just(10**6),
    "top_logprobs": st.integers(-2, 25) | st.just(10**6),
    "prompt_logprobs": st.integers(-2, 25) | st.just(10**6),
    "echo": st.booleans(),
    "logit_bias": _bias,
    "stop": _text | st.lists(_text, max_size=3),
    "stop_token_ids": st.lists(_ids, max_size=3),
    "allowed_token_ids": st.lists(_ids, max_size=3),
    "bad_words": st.lists(_text, max_size=3),
    "ignore_eos": st.booleans(),
    "truncate_prompt_tokens": st.integers(-2, 12) | _numbers,
    "structured_outputs": _rule,
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "structural_tag"])},
        optional={"json_schema": st.fixed_dictionaries({"name": _text, "schema": _schema}) | junk},
    ),
    "best_of": st.integers(-1, 3),
    "use_beam_search": st.booleans(),
    "return_token_ids": st.booleans(),
    "add_special_tokens": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "priority": _numbers,
    "cache_salt": _text,
    "mm_processor_kwargs": st.dictionaries(_text, junk, max_size=2),
    "stream_options": st.fixed_dictionaries({"include_usage": junk}),
    "tools": junk,
    "tool_choice": junk,
    "model": junk,
    "user": junk,
    "vllm_xargs": st.dictionaries(
        st.sampled_from(["msd", "msd_max_nodes", "else"]), st.booleans() | st.integers(-1, 9) | junk
    ),
    "kv_transfer_params": junk,
    "suffix": _text,
    "no_such_field": junk,
}
# Junk may be a large whole number; what answers with so many samples or tokens is not for it.
_NO_JUNK = {"n", "max_tokens", "best_of", "min_tokens"}
_field = st.sampled_from(sorted(_ODD)).flatmap(
    lambda key: st.tuples(
        st.just(key), _ODD[key] if key in _NO_JUNK else _ODD[key] | _ODD[key] | junk
    )
)
_fields = st.lists(_field, max_size=2).map(dict)


@functools.cache
def _pictures() -> list[str]:
    """Data URLs of pictures, from good ones to none at all."""

    def encoded(kind: str, mode: str, size: tuple[int, int]) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, format=kind)
        return buffer.getvalue()

    good = encoded("PNG", "RGB", (112, 112))
    files = [
        *(good, good[:50], b"", b"\x89PNG\r\n\x1a\n", good.replace(b"IDAT", b"IDOT")),
        *(encoded("PNG", "RGB", (1, 1)), encoded("PNG", "RGB", (3000, 1))),
        *(encoded("PNG", "1", (9, 7)), encoded("PNG", "I;16", (8, 8)), encoded("GIF", "P", (5, 5))),
        *(
            encoded("PNG", "LA", (8, 8)),
            encoded("TIFF", "F", (8, 8)),
            encoded("JPEG", "CMYK", (8, 8)),
        ),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        # A header that promises more pixels than any memory holds, and one that promises none.
        good[:16] + b"\x7f\xff\xff\xff" * 2 + good[24:],
        good[:16] + b"\0" * 8 + good[24:],
    ]
    urls = [f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in files]
    return [
        *urls,
        "data:,",
        "data:image/png;base64,@@",
        "file:///etc/hostname",
        "ftp://x/y",
        "",
        "x",
    ]


_part = st.one_of(
    _text.map(lambda text: {"type": "text", "text": text}),
    st.deferred(lambda: st.sampled_from(_pictures())).map(
        lambda url: {"type": "image_url", "image_url": {"url": url}}
    ),
    st.just({"type": "image_url"}),
    st.just({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}),
    junk,
)
_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "system", "assistant", "tool", "nobody"]) | junk,
        "content": st.lists(_part, max_size=3) | _text | junk,
    }
)
_prompt = (
    _text
    | junk
    | st.lists(_ids, max_size=8)
    | st.lists(st.lists(_ids, max_size=3) | _text, max_size=3)
    | st.integers(1, 1100).map(lambda length: [5] * length)
)
_good_chat = [{"role": "user", "content": "what is this?"}]
_chat = st.builds(
    lambda messages, rest: ("chat/completions", {"messages": messages, "max_tokens": 4} | rest),
    st.just(_good_chat) | st.just(_good_chat) | st.lists(_message, max_size=3) | junk,
    _fields,
)
_completion = st.builds(
    lambda prompt, rest: ("completions", {"prompt": prompt, "max_tokens": 4} | rest),
    st.just("hello there") | st.just("hello there") | _prompt,
    _fields,
)
_tables = st.builds(
    lambda request, stream: (request[0], request[1] | ({"stream": True} if stream else {})),
    _chat | _completion,
    st.sampled_from([False, False, False, True]),
)
# As sent, in the place of a table; most of it is no JSON at all.
_raw = st.tuples(
    st.sampled_from(["chat/completions", "completions"]),
    st.sampled_from(
        [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b"\0" * 9, b"[" * 9000, b"{}"]
    )
    | st.binary(max_size=40),
)
# Path and body of a request; some are streamed.
requests = st.one_of(*[_tables] * 15, _raw)


def send(server: Server, path: str, body: Any) -> tuple[int, str]:
    """Post a body as JSON, bytes as they are; its status and answer.

    NaN and lone surrogates go as Python writes them.

    Raises:
        OSError: the server does not answer.
    """
    request = urllib.request.Request(
        f"{server.url}/v1/{path}",
        data=body if isinstance(body, bytes) else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=HANGS) as reply:
            return reply.status, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def fuzz(server: Server, examples: int, number: int, check: Any) -> dict[str, int]:
    """Send that many drawn requests; ``check(path, body, status, answer)`` judges each.

    Returns:
        how often each status came.
    """
    from hypothesis import HealthCheck, Phase, given, seed, settings

    statuses: dict[str, int] = {}

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests)
    def one(request: tuple[str, dict[str, Any] | bytes]) -> None:
        path, body = request
        if isinstance(body, dict):
            body.setdefault("model", "msd-demo")
        status, answer = send(server, path, body)
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        check(path, body, status, answer)

    one()
    return dict(sorted(statuses.items()))
