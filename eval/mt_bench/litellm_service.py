"""Judges whose services speak another protocol (Anthropic, Gemini, ...), called through the package litellm.

It is an extra, ``pip install 'salient-ds[judges]'``, and imported only when such a judge is asked. It only translates
requests and replies: attempts, waits, limits and the cache are ours, as for every other judge.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from .endpoint import Endpoint
from .transport import MOST_BYTES, LoopThread, Lost, NotConnected, Received, TooLarge


class LiteLLMTransport:
    """Sends one chat request through litellm. Thread-safe.

    Raises:
        ValueError: the package is missing, or an option does not go with it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        if endpoint.stream:
            raise ValueError("--stream does not go with --service litellm, which needs no streams")
        self._litellm = _import()
        endpoint.key()  # a missing key is an error now, not at the first call
        self._loop = LoopThread()

    def send(self, method: str, url: str, body: Any = None) -> Received:
        """Send a chat request. ``url`` only says what is asked; litellm knows the vendors' addresses."""
        if not url.endswith("/chat/completions") or not isinstance(body, dict):
            raise ValueError("--service litellm only knows chat requests")
        return self._loop.run(self._bounded(body))

    def close(self) -> None:
        self._loop.close()

    async def _bounded(self, body: dict[str, Any]) -> Received:
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):
                return await self._ask(body)
        except TimeoutError:
            raise Lost(f"timeout (no whole reply after {self.endpoint.timeout_s:g} s)") from None

    async def _ask(self, body: dict[str, Any]) -> Received:
        endpoint = self.endpoint
        headers = {name: value for name, value in endpoint.secret_headers().items() if name in endpoint.headers}
        try:
            found = await self._litellm.acompletion(
                **body, api_key=endpoint.key() or "none", api_base=endpoint.base_url or None, num_retries=0,
                max_retries=0, timeout=endpoint.timeout_s, extra_headers=headers or None,
            )  # fmt: skip
        except asyncio.CancelledError:
            raise
        except Exception as error:  # litellm wraps the errors of many libraries
            return _refusal(error)
        data = json.dumps(found.model_dump(), default=str).encode()
        if len(data) > MOST_BYTES:
            raise TooLarge(f"the reply is larger than {MOST_BYTES >> 20} MiB")
        return Received(200, {"content-type": "application/json"}, data)


def _refusal(error: Exception) -> Received:
    """Make the reply that the vendor's server must have sent.

    Raises:
        Lost, NotConnected: it sent none.
    """
    name, status = type(error).__name__, getattr(error, "status_code", None)
    text = str(getattr(error, "message", "") or error)
    if name in ("Timeout", "APITimeoutError", "APIConnectionError") or not isinstance(status, int):
        refused = "connect" in text.lower() and ("refused" in text.lower() or "cannot connect" in text.lower())
        raise (NotConnected if refused else Lost)(f"{name}: {text[:200]}") from None
    response = getattr(error, "response", None)
    found = getattr(error, "litellm_response_headers", None) or getattr(response, "headers", None) or {}
    headers = {str(key).lower(): str(value) for key, value in dict(found).items()}
    headers.pop("content-type", None)
    return Received(status, headers, json.dumps({"error": {"message": text, "type": name}}).encode())


def _import() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a price list from the web
    try:
        import litellm
    except ImportError:
        raise ValueError("--service litellm needs the package litellm: pip install 'salient-ds[judges]'") from None
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.drop_params = False  # a parameter that a model does not know is an error, and is never left out silently
    return litellm
