"""What `helm test` runs: the gateway is ready, lists a model, streams an answer and accounts for it.

One connection is used throughout, so that with several gateways the receipt is asked of the one that has it.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_RETRY_S = 2.0
_PROMPT = "The code for maple is 4711. What is the code for maple?"


class SmokeTest:
    """One pass over a gateway's API."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        split = urlsplit(url)
        # HTTPS trusts SSL_CERT_FILE.
        connect = http.client.HTTPSConnection if split.scheme == "https" else http.client.HTTPConnection
        self._connection = connect(split.hostname or "", split.port, timeout=timeout_s)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def run(self) -> str:
        """Raises ValueError or OSError for what is wrong; returns a line about what was seen."""
        model = self._get("/v1/models")["data"][0]["id"]
        response = self._send(
            "POST",
            "/v1/chat/completions",
            {
                "model": model,
                "messages": [{"role": "user", "content": _PROMPT}],
                "max_tokens": 16,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
        chunks, last = _read_events(response)
        _check(last == "[DONE]", f"the stream ended with {last!r}, not [DONE]")
        usage: dict[str, Any] = next((chunk["usage"] for chunk in chunks if chunk.get("usage")), {})
        _check(usage.get("completion_tokens", 0) > 0, f"usage counts no completion tokens: {usage}")
        receipt = self._get(f"/v1/requests/{chunks[0]['id']}")
        _check(receipt["outcome"] in ("stop", "length"), f"the receipt's outcome is {receipt['outcome']!r}")
        mode = receipt["decision"]["mode"]
        transfer = receipt.get("transfer") or {}
        _check(mode != "remote" or transfer.get("bytes", 0) > 0, f"a remote prefill moved no bytes: {transfer}")
        return (
            f"{model}: {usage['completion_tokens']} tokens, {mode} prefill, {transfer.get('bytes', 0)} bytes moved, "
            f"first token after {receipt['ttft_ms']:.0f} ms"
        )

    def wait_until_ready(self, deadline: float) -> None:
        """Asks until the gateway is ready; raises the last answer at ``deadline`` (of time.monotonic)."""
        while True:
            try:
                self._send("GET", "/ready").read()
                return
            except (OSError, ValueError, http.client.HTTPException) as error:
                self._connection.close()
                if time.monotonic() + _RETRY_S > deadline:
                    raise ValueError(f"the gateway is not ready: {error}") from error
            time.sleep(_RETRY_S)

    def _get(self, path: str) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self._send("GET", path).read())
        return body

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        self._connection.request(method, path, json.dumps(body) if body else None, self._headers)
        response = self._connection.getresponse()
        _check(response.status == http.client.OK, f"{method} {path}: {response.status} {_shown(response)}")
        return response


def _shown(response: http.client.HTTPResponse) -> str:
    return response.read(2000).decode(errors="replace") if response.status != http.client.OK else ""


def _read_events(response: http.client.HTTPResponse) -> tuple[list[dict[str, Any]], str]:
    """All JSON events of a stream, and the text of its last event. Reads to the end, which frees the connection."""
    events = [line[len(b"data:") :].strip().decode() for line in response if line.startswith(b"data:")]
    _check(len(events) > 1, f"the stream had {len(events)} events")
    return [json.loads(event) for event in events[:-1]], events[-1]


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def main() -> int:
    """Reads GATEWAY_URL, TIMEOUT_S and API_KEY_FILE; returns the exit status."""
    timeout_s = float(os.environ["TIMEOUT_S"])
    key_file = os.environ.get("API_KEY_FILE")
    keys = Path(key_file).read_text(encoding="utf-8").split() if key_file else []
    test = SmokeTest(os.environ["GATEWAY_URL"], keys[0] if keys else None, timeout_s)
    try:
        test.wait_until_ready(time.monotonic() + timeout_s)
        print(test.run())
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
