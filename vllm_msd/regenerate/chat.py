"""Replies from an OpenAI-compatible chat API that may be slow, busy, or away for a while."""

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import httpx

from vllm_msd.errors import ConfigError, MSDError

_LONGEST_PAUSE = 30.0
_PROBE_SECONDS = 10.0


class ServerGoneError(MSDError):
    """The server did not come back; what is done so far is kept."""


class RefusedError(Exception):
    """The server will never answer this request: its fault or the request's, told in a sentence."""


class NoAnswerError(Exception):
    """No answer after all attempts, for reasons that may pass."""


@dataclass(frozen=True)
class Reply:
    """text: without white space around it, which templates write themselves. tokens: generated,
    as the server counts. is_cut: it ended at the limit of tokens."""

    text: str
    tokens: int
    is_cut: bool


class ChatAPI:
    """One model behind an API.

    Args:
        client: its ``base_url`` is the server's, its headers hold the key.
        model: name, or None for the first that the server lists.
        settings: the same ones for every request: ``max_tokens``, ``temperature``, ``top_p``.
        retries: further attempts after one that failed.
        wait: seconds that the server may be away.
        mend: what the user can do when it has gone.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str | None,
        settings: dict[str, Any],
        retries: int,
        wait: float,
        mend: str,
    ) -> None:
        self.client, self.settings, self.retries, self.wait = client, settings, retries, wait
        self._model, self._mend = model, mend
        self._door = asyncio.Lock()

    @property
    def model(self) -> str:
        """The model's name, after `find_model`."""
        if self._model is None:
            raise RuntimeError("find_model comes first")
        return self._model

    async def find_model(self) -> str:
        """The name of the model; asks the server for it where none was given.

        Raises:
            ServerGoneError: no answer in ``wait`` seconds.
            ConfigError: an answer, but no list of models.
        """
        await self._until_there()
        if self._model is None:
            reply = await self.client.get("/v1/models")
            self._model = _first_model(reply)
            if self._model is None:
                raise ConfigError(
                    f"--server: {self.client.base_url} answers {_said(reply)}, expected a list of "
                    "models. Give the address of an OpenAI-compatible server, or --model."
                )
        return self._model

    async def reply(self, messages: list[dict[str, Any]], seed: int | None) -> Reply:
        """The model's reply to a conversation.

        Args:
            messages: in OpenAI's form. seed: of the sampling, or None.

        Raises:
            RefusedError: this request cannot be answered.
            NoAnswerError: it was not, after all attempts.
            ServerGoneError: the server stayed away.
            ConfigError: no request can be answered: a wrong key, address or model.
        """
        body = {"model": self.model, "messages": messages, **self.settings}
        if seed is not None:
            body["seed"] = seed
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(min(_LONGEST_PAUSE, 2.0 ** (attempt - 2)) * random.random())
            try:
                answer = await self.client.post("/v1/chat/completions", json=body)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                await self._until_there()
                continue
            if answer.status_code != 200:
                reason = _said(answer)
                await self._judge(answer)
                continue
            found = _read(answer)
            if isinstance(found, Reply):
                return found
            reason = found
        raise NoAnswerError(f"no answer after {self.retries + 1} attempts: {reason}")

    async def _judge(self, answer: httpx.Response) -> None:
        """After an answer that is an error: raise what it means, or wait until asking again."""
        status = answer.status_code
        if status in (401, 403, 404):
            raise ConfigError(
                f"{self.client.base_url} refuses every request: {_said(answer)}. The key comes "
                "from the variable OPENAI_API_KEY, the model from --model."
            )
        if status < 500 and status not in (408, 409, 425, 429):
            raise RefusedError(_said(answer))
        pause = answer.headers.get("retry-after", "")
        if pause.isdigit():
            await asyncio.sleep(min(int(pause), self.wait))
        await self._until_there()

    async def _until_there(self) -> None:
        """Wait until the server answers. One asks at a time, so that it is not stormed."""
        async with self._door:
            clock = asyncio.get_running_loop().time
            end, pause = clock() + self.wait, 0.25
            while True:
                try:
                    # Servers of other makers have no such page, and say so: they are there.
                    health = await self.client.get("/health", timeout=_PROBE_SECONDS)
                    if health.status_code < 500:
                        return
                    reason = _said(health)
                except httpx.TransportError as error:
                    reason = str(error) or type(error).__name__
                if clock() >= end:
                    raise ServerGoneError(
                        f"{self.client.base_url} does not answer ({reason}). {self._mend} the same "
                        "command again: it goes on where it was."
                    )
                await asyncio.sleep(pause)
                pause = min(2 * pause, 5.0)


def _read(answer: httpx.Response) -> Reply | str:
    """The reply in an answer, or what is wrong with it."""
    try:
        found = answer.json()
        choice = found["choices"][0]
        text, ending = choice["message"].get("content") or "", choice.get("finish_reason")
        tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
        text = text.strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"no chat completion but {answer.text[:200]!r}"
    # A server that is shut down may answer with what it has so far.
    if ending not in ("stop", "length"):
        return f"the reply ended with {ending!r}"
    return Reply(text, tokens, ending == "length")


def _first_model(answer: httpx.Response) -> str | None:
    try:
        name = answer.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _said(answer: httpx.Response) -> str:
    """Status and message of an error, in a line."""
    try:
        found = answer.json()
        error = found.get("error", found)
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, AttributeError):
        text = answer.text
    return f"{answer.status_code} {' '.join(text.split())[:300]}".strip()
