"""A Kubernetes API server that only keeps what it is given: enough of one for Helm to install a chart into.

It serves discovery, create, read, list, replace, apply, merge and delete over HTTP on loopback. There is no admission, no
controller and no watch, so Helm must not wait for readiness. Helm writes its release Secrets in protobuf
(`application/vnd.kubernetes.protobuf`); all answers are JSON, which its client accepts too.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.charts.protobuf import decode_secret

Object = dict[str, Any]

# API group and version -> plural resource name -> kind. All of these live in a namespace.
RESOURCES: dict[str, dict[str, str]] = {
    "v1": {
        "configmaps": "ConfigMap",
        "pods": "Pod",
        "secrets": "Secret",
        "serviceaccounts": "ServiceAccount",
        "services": "Service",
    },
    "apps/v1": {"deployments": "Deployment", "replicasets": "ReplicaSet", "statefulsets": "StatefulSet"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
}
_VERBS = ["create", "delete", "get", "list", "patch", "update"]


class ApiError(Exception):
    """An answer with a Kubernetes Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "code": code,
            "message": message,
        }


class FakeKubernetes:
    """A running server. ``objects`` maps (kind, namespace, name) to what was stored."""

    def __init__(self, version: str = "1.34.0") -> None:
        self.version = version
        self.objects: dict[tuple[str, str, str], Object] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> FakeKubernetes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def kubeconfig(self) -> str:
        """Contents of a kubeconfig file for this server."""
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                "users": [{"name": "fake", "user": {}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                "current-context": "fake",
            }
        )

    def get(self, kind: str, namespace: str, name: str) -> Object:
        """A stored object; KeyError if there is none."""
        return self.objects[kind, namespace, name]

    def answer(self, method: str, url: str, content_type: str, body: bytes) -> Object:
        """The answer to one request; raises ApiError for a refusal."""
        split = urlsplit(url)
        parts = [part for part in split.path.split("/") if part]
        if method == "GET" and (found := self._discover(parts)) is not None:
            return found
        group_version, rest = _split_group_version(parts)
        if len(rest) < 3 or rest[0] != "namespaces" or rest[2] not in RESOURCES.get(group_version, {}):
            raise ApiError(404, "NotFound", f"no resource at {split.path}")
        namespace, kind = rest[1], RESOURCES[group_version][rest[2]]
        query = parse_qs(split.query)
        with self._lock:
            if len(rest) == 3 and method == "GET":
                return self._list(group_version, kind, namespace, query.get("labelSelector", [""])[0])
            # What deletes say in their body is how to delete, which makes no difference here.
            sent = _decode(content_type, body) if body and method != "DELETE" else {}
            if len(rest) == 3 and method == "POST":
                return self._create(group_version, kind, namespace, sent)
            if len(rest) == 4:
                return self._change(method, group_version, (kind, namespace, rest[3]), content_type, sent)
        raise ApiError(405, "MethodNotAllowed", f"{method} {split.path}")

    def _discover(self, parts: list[str]) -> Object | None:
        if parts == ["version"]:
            major, minor, _ = self.version.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{self.version}"}
        if parts == ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        if parts == ["apis"]:
            return {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [_group(name) for name in RESOURCES if "/" in name],
            }
        group_version, rest = _split_group_version(parts)
        if rest or group_version not in RESOURCES:
            return None
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": _VERBS}
            for plural, kind in RESOURCES[group_version].items()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}

    def _list(self, group_version: str, kind: str, namespace: str, selector: str) -> Object:
        wanted = dict(term.split("=", 1) for term in selector.split(",") if term)
        items = [
            stored
            for (stored_kind, stored_namespace, _), stored in self.objects.items()
            if (stored_kind, stored_namespace) == (kind, namespace)
            and wanted.items() <= stored["metadata"].get("labels", {}).items()
        ]
        return {"kind": f"{kind}List", "apiVersion": group_version, "metadata": {}, "items": items}

    def _create(self, group_version: str, kind: str, namespace: str, sent: Object) -> Object:
        key = kind, namespace, sent["metadata"]["name"]
        if key in self.objects:
            raise ApiError(409, "AlreadyExists", f"{kind} {key[2]} already exists")
        return self._store(group_version, key, sent)

    def _change(
        self, method: str, group_version: str, key: tuple[str, str, str], content_type: str, sent: Object
    ) -> Object:
        if method == "PATCH" and content_type == "application/apply-patch+yaml":
            return self._store(group_version, key, sent)
        stored = self.objects.get(key)
        if stored is None:
            raise ApiError(404, "NotFound", f"{key[0]} {key[2]} not found")
        if method == "GET":
            return stored
        if method == "PUT":
            return self._store(group_version, key, sent)
        if method == "PATCH" and content_type == "application/merge-patch+json":
            return self._store(group_version, key, _merged(stored, sent))
        if method == "DELETE":
            return self.objects.pop(key)
        raise ApiError(415, "UnsupportedMediaType", f"{method} with {content_type}")

    def _store(self, group_version: str, key: tuple[str, str, str], sent: Object) -> Object:
        if sent["metadata"]["name"] != key[2] or sent["metadata"].get("namespace") not in (None, "", key[1]):
            raise ApiError(400, "BadRequest", f"{key} does not match the object's metadata")
        stored = {"apiVersion": group_version, "kind": key[0], **sent}
        self.objects[key] = stored
        return stored


def _split_group_version(parts: list[str]) -> tuple[str, list[str]]:
    """``["apis", "apps", "v1", ...]`` -> ``"apps/v1", [...]``; the core group has no name."""
    if parts[:1] == ["apis"]:
        return "/".join(parts[1:3]), parts[3:]
    return "/".join(parts[1:2]), parts[2:]


def _group(group_version: str) -> Object:
    version = {"groupVersion": group_version, "version": group_version.split("/")[1]}
    return {"name": group_version.split("/")[0], "versions": [version], "preferredVersion": version}


def _decode(content_type: str, body: bytes) -> Object:
    if content_type == "application/vnd.kubernetes.protobuf":
        return decode_secret(body)
    if content_type == "application/apply-patch+yaml":
        return dict(yaml.safe_load(body))
    if content_type in ("application/json", "application/merge-patch+json"):
        return dict(json.loads(body))
    raise ApiError(415, "UnsupportedMediaType", content_type)


def _merged(target: Mapping[str, Any], patch: Mapping[str, Any]) -> Object:
    """RFC 7386: null removes, objects merge, everything else replaces."""
    result = dict(target)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = _merged(result.get(key) or {}, value)
        else:
            result[key] = value
    return result


def secret(namespace: str, name: str, **data: str) -> Object:
    """A Secret as a cluster holds it."""
    encoded = {key.replace("_", "-"): base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": namespace, "name": name}, "data": encoded}


def _handler(api: FakeKubernetes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            content_type = self.headers.get("Content-Type", "").split(";")[0].strip()
            try:
                code, answer = 200, api.answer(self.command, self.path, content_type, body)
            except ApiError as error:
                code, answer = error.code, error.status
            encoded = json.dumps(answer).encode()
            self.send_response(201 if code == 200 and self.command == "POST" else code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            """Silent."""

    return Handler
