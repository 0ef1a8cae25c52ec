"""Stands in for a worker or gateway below the supervisor: ``stand_in.py gateway|prefill|decode FLAG...``.

All share the directory STAND_IN_DIR: what they do goes into "log"; "NAME.do" tells NAME how to behave from its next start.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from baton.services.runtime.process import die_with_parent

DIRECTORY = Path(os.environ["STAND_IN_DIR"])


def _accepted() -> set[str | None]:
    """What a gateway that was given a file of keys lets in."""
    files = [Path(sys.argv[i + 1]) for i, argument in enumerate(sys.argv) if argument == "--api-key-file"]
    return {f"Bearer {key}" for file in files for key in file.read_text().splitlines()} or {None}


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def log(text: str) -> None:
    with (DIRECTORY / "log").open("a", encoding="utf-8") as file:
        file.write(f"{NAME} {text}\n")


def on_sigterm(*_: Any) -> None:
    log("drained")
    os._exit(0)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = 200, {}
        if self.path == "/v1/workers":
            if self.headers["authorization"] not in _accepted():
                status, body = 401, {"error": {"message": "no"}}
            else:
                body = {
                    "object": "list",
                    "data": [json.loads(p.read_text()) for p in sorted(DIRECTORY.glob("*.worker"))],
                }
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGTERM, on_sigterm)
    log(f"started {os.getpid()}")
    (DIRECTORY / f"{NAME}.argv").write_text("\n".join(sys.argv))
    (DIRECTORY / f"{NAME}.env").write_text("\n".join(f"{k}={v}" for k, v in os.environ.items()))
    behaviour = DIRECTORY / f"{NAME}.do"
    do = behaviour.read_text() if behaviour.exists() else ""
    if do == "refuse":
        from baton.services.core.errors import ConfigurationError
        from baton.services.runtime.settings_loader import report_problems  # half a second of imports, else not needed

        return report_problems(NAME, ConfigurationError("model.safetensors: truncated"))
    if do == "crash":
        return 1
    if do == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if do == "hang":
        signal.pause()
    if NAME == "gateway":
        server = http.server.ThreadingHTTPServer((flag("--host"), int(flag("--port"))), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        counts = {"total": 1000, "free": 1000, "cached": 0, "request": 0, "transfer": 0, "quarantine": 0}
        row = {
            "id": NAME,
            "role": NAME.rpartition("-")[0],
            "state": "ready",
            "pid": os.getpid(),
            "address": "127.0.0.1:1",
        }
        row |= {"queued": 0, "running": 0, "overdue": 0, "kv_blocks": counts}
        row |= {"block_size": 16, "max_model_len": 2048, "kv_dtype": "float32"}
        (DIRECTORY / f"{NAME}.worker").write_text(json.dumps(row))
    log("ready")
    while True:
        signal.pause()


if __name__ == "__main__":
    NAME = "gateway" if sys.argv[1] == "gateway" else flag("--worker-id")
    sys.exit(main())
