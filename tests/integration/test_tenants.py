"""``baton serve`` with tenants: who comes in, how often, that a change of the file holds at once, and whose cache is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import yaml
from helpers.oracle import make_subject
from helpers.serving import Serving, baton, serving
from helpers.waiting import eventually_sync

from baton.services.gateway.tenant_files import hashed

OPTIONS = ("--kv-cache-memory", "16MiB", "--dtype", "float32", "--served-model-name", "tiny", "--mode", "colocated")
PATIENCE_S = 60.0


def write(path: Path, **tenants: dict[str, Any]) -> None:
    """Each tenant's key is its name."""
    entries = [{"name": name, "keys": [hashed(name)], **fields} for name, fields in tenants.items()]
    path.write_text(yaml.safe_dump({"tenants": entries}))


def ask(server: Serving, key: str | None) -> httpx.Response:
    body = {"model": "tiny", "prompt": list(range(10, 60)), "max_tokens": 2, "temperature": 0}
    return server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"} if key else {})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def cached_tokens(response: httpx.Response) -> int:
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_tenants_come_and_go_while_it_serves(tmp_path: Path) -> None:
    subject = make_subject("qwen3", tmp_path / "model")
    tenants = tmp_path / "tenants.yaml"
    write(tenants, one={"requests_per_minute": 2}, other={})
    with serving("--model", str(subject.path), *OPTIONS, "--tenants-file", str(tenants)) as server:
        assert ask(server, None).status_code == 401
        assert ask(server, "nobody").status_code == 401
        assert cached_tokens(ask(server, "one")) == 0
        assert cached_tokens(ask(server, "one")) == 48
        refused = ask(server, "one")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert cached_tokens(ask(server, "other")) == 0  # the same prompt, of another tenant
        receipt = server.get(f"/v1/requests/{ask(server, 'other').json()['id']}", headers=bearer("other"))
        assert receipt.status_code == 200
        assert server.get(f"/v1/requests/{receipt.json()['id']}", headers=bearer("one")).status_code == 404
        assert server.post("/v1/workers/colocated-0/drain", None, headers=bearer("other")).status_code == 403
        write(tenants, one={"requests_per_minute": 1000}, third={"admin": True})
        eventually_sync(lambda: ask(server, "third").status_code == 200, timeout_s=PATIENCE_S)
        assert cached_tokens(ask(server, "one")) == 48
        assert server.get("/v1/workers/colocated-0/blocks", headers=bearer("third")).status_code == 200
        assert server.get(f"/v1/requests/{receipt.json()['id']}", headers=bearer("third")).status_code == 200
        assert ask(server, "other").status_code == 401
        tenants.write_text("tenants: []")
        eventually_sync(
            lambda: any("cannot be used" in line for line in server.lines), timeout_s=PATIENCE_S, what="its complaint"
        )
        assert ask(server, "third").status_code == 200
        assert ask(server, None).status_code == 401
        assert not any("Bearer third" in line or hashed("third") in line for line in server.lines)
        # Who runs it may take a worker out of use, whatever keys there are, and needs none.
        drained = baton("drain", "colocated-0", "--url", server.url, env={"BATON_API_KEY": "one"})
        assert (drained.returncode, drained.stdout) == (0, "colocated-0 is drained\n"), drained.stderr


def test_a_flood_of_one_tenant_leaves_another_its_cache(tmp_path: Path) -> None:
    """Through both pools. The same flood under the victim's own key shows that it is large enough."""
    subject = make_subject("qwen3", tmp_path / "model")
    options = (*OPTIONS[2:-2], "--kv-cache-memory", "1MiB", "--max-num-seqs", "2")
    with serving("--model", str(subject.path), *options, "--api-key", "victim", "--api-key", "flood") as server:
        server.key = "victim"
        server.wait_for_workers(2)
        num_blocks = min(worker["kv_blocks"]["total"] for worker in server.workers())
        assert 40 <= num_blocks <= 120
        victims = [[number, *range(10, 90)] for number in range(num_blocks // 20)]  # six blocks each

        def hits(key: str, prompts: list[list[int]]) -> int:
            found = 0
            for prompt in prompts:
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0}
                response = server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"})
                assert response.status_code == 200, response.text
                found += cached_tokens(response)
            return found

        flood = [[number, *range(100, 250)] for number in range(num_blocks // 4)]  # ten blocks each: twice the caches
        assert hits("victim", victims) == 0
        before = hits("victim", victims)
        assert before == len(victims) * 80
        assert hits("flood", flood) == 0
        assert hits("victim", victims) >= 0.8 * before
        figure = 'baton_kv_cache_tenants{worker="prefill-0"} 2.0'
        eventually_sync(lambda: figure in server.get("/metrics").text, timeout_s=PATIENCE_S, what=figure)
        hits("victim", flood)
        assert hits("victim", victims) < 0.8 * before
