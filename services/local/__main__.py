"""The ``baton`` command. Imports stay light here: what a command needs is imported when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from baton.services.core.errors import ConfigurationError
from baton.services.local.bundled import with_model
from baton.services.local.late_commands import LateGroup
from baton.services.local.options import add_settings_command
from baton.services.runtime.admin_options import ADMIN_HOST
from baton.services.runtime.net import port_problem
from baton.services.runtime.process import (
    bound_primitive_caches,
    die_with_parent,
    exit_cleanly_on_signals,
    start_without_collector,
)
from baton.services.runtime.settings import GatewayOptions, GatewaySettings, ServeSettings, WorkerSettings
from baton.services.runtime.settings_loader import EXIT_BAD_CONFIGURATION, SettingsError, report_problems

app = typer.Typer(
    name="baton",
    cls=LateGroup,
    help="Serves language models with prefill and decode on separate worker pools.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        from importlib.metadata import version

        typer.echo(f"baton {version('baton-llm')}")
        raise typer.Exit


def _serve(settings: ServeSettings) -> int:
    from baton.services.local.supervisor import serve

    _check_ports(settings)
    return serve(with_model(settings))


def _gateway(settings: GatewaySettings) -> int:
    start_without_collector()
    _check_ports(settings)
    settings = with_model(settings)
    if settings.ssl_ca_certs is not None:
        _let_grpc_tell_refusals()
    from baton.services.gateway.__main__ import run

    return run(settings)


def _worker(settings: WorkerSettings) -> int:
    start_without_collector()
    bound_primitive_caches()
    settings = with_model(settings)
    if settings.threads_per_worker is not None:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads_per_worker)  # torch reads it when it is imported
    if settings.tls_ca_file is not None:
        _let_grpc_tell_refusals()
    from baton.services.local.worker_process import run

    return run(settings)


def _let_grpc_tell_refusals() -> None:
    """Why a handshake failed is known to gRPC's own library alone, and it says so at this level. Before its import."""
    if os.environ.get("GRPC_VERBOSITY") == "ERROR":
        os.environ["GRPC_VERBOSITY"] = "INFO"


def _check_ports(settings: GatewayOptions) -> None:
    host = settings.host
    ports = [(host, settings.port, "--port"), (host, settings.grpc_port, "--grpc-port")]
    if settings.admin_port is not None:
        ports.append((ADMIN_HOST, settings.admin_port, "--admin-port"))
    problems = [problem for where in ports if (problem := port_problem(*where)) is not None]
    if problems:
        raise SettingsError(problems)


add_settings_command(app, "serve", ServeSettings, _serve, help_text="Serve a model with everything on this machine.")
add_settings_command(
    app, "gateway", GatewaySettings, _gateway, help_text="Run a gateway: REST and gRPC in, workers behind."
)
add_settings_command(
    app, "prefill", WorkerSettings, _worker, help_text="Run a prefill worker.", fixed={"role": "prefill"}
)
add_settings_command(
    app, "decode", WorkerSettings, _worker, help_text="Run a decode worker.", defaults={"role": "decode"}
)


@app.command("demo")
def _demo() -> int:
    """Start everything, ask the bundled model one question through both pools, show answer and receipt, stop."""
    from baton.services.local.demo import run_demo

    return run_demo()


_Url = Annotated[str, typer.Option(help="Where the gateway's REST API is.", envvar="BATON_URL")]
_Key = Annotated[str | None, typer.Option(help="API key.", envvar="BATON_API_KEY", show_envvar=False)]
# Of commands that change something, or show what tenants should not see.
_AdminUrl = Annotated[
    str,
    typer.Option(
        help="The gateway's admin listener (--admin-port), or its REST API where that has these routes.",
        envvar=["BATON_ADMIN_URL", "BATON_URL"],
    ),
]
_AdminKey = Annotated[
    str | None,
    typer.Option(
        help="Key of the admin listener, or of a tenant with admin: true.",
        envvar=["BATON_ADMIN_KEY", "BATON_API_KEY"],
        show_envvar=False,
    ),
]


_Timeout = Annotated[
    float, typer.Option(help="Seconds that running requests get; what is left goes on elsewhere.", min=0.001, max=3600)
]


def _use_ca(path: Path | None) -> Path | None:
    """For this command and what it starts."""
    if path is not None:
        os.environ["SSL_CERT_FILE"] = str(path)
    return path


_Ca = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        help="CA that signed the certificate of an https:// URL. Default: SSL_CERT_FILE, or the system's.",
        callback=_use_ca,
        exists=True,
        dir_okay=False,
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]


@app.command("status")
def _status(
    url: _Url = "http://127.0.0.1:8000",
    api_key: _Key = None,
    ca_file: _Ca = None,
    watch: Annotated[
        float | None, typer.Option(help="Again every so many seconds, until Ctrl-C.", metavar="SECONDS", min=0.1)
    ] = None,
    as_json: _Json = False,
) -> int:
    """Show a running gateway: readiness, requests, workers with queues and blocks, links, service levels."""
    from baton.services.local.status import show_status

    return show_status(url, api_key, watch_s=watch, as_json=as_json)


@app.command("top")
def _top(url: _Url = "http://127.0.0.1:8000", api_key: _Key = None, ca_file: _Ca = None) -> int:
    """The same every second, with rates, until Ctrl-C."""
    from baton.services.local.status import show_status

    return show_status(url, api_key, watch_s=1.0)


@app.command("profile")
def _profile(
    url: _Url = "http://127.0.0.1:8000",
    api_key: _Key = None,
    ca_file: _Ca = None,
    output: Annotated[Path, typer.Option(help="Where the JSON goes.", dir_okay=False)] = Path("baton-profile.json"),
    quick: Annotated[bool, typer.Option(help="A small grid: a few points, two of each.")] = False,
) -> int:
    """Measure the workers behind a running gateway, for --profile: prompts, steps, transfers."""
    from baton.services.local.profile import QUICK, Grid, run_profile

    return run_profile(url, api_key, output, QUICK if quick else Grid())


@app.command("explain")
def _explain(
    request_id: Annotated[str, typer.Argument(help="A response's id, or the x-request-id.", metavar="ID")],
    url: _Url = "http://127.0.0.1:8000",
    api_key: _Key = None,
    ca_file: _Ca = None,
    as_json: _Json = False,
) -> int:
    """Show a request's receipt: where it went and why, and what each phase took."""
    from baton.services.local.explain import explain

    return explain(url, api_key, request_id, as_json=as_json)


@app.command("chat")
def _chat(
    question: Annotated[str | None, typer.Argument(help="One question. Without it: a conversation.")] = None,
    url: _Url = "http://127.0.0.1:8000",
    api_key: _Key = None,
    ca_file: _Ca = None,
    model: Annotated[str | None, typer.Option(help="Default: the model that is served.", metavar="NAME")] = None,
    system: Annotated[str | None, typer.Option(help="System message.", metavar="TEXT")] = None,
    session_id: Annotated[str | None, typer.Option(help="Default: a new one.", metavar="ID")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of each answer.", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0, max=2)] = None,
) -> int:
    """Talk to a served model; with a question, or with text on standard input, one answer."""
    from baton.services.local.chat import ChatOptions, chat

    return chat(url, api_key, question, ChatOptions(model, system, session_id, max_tokens, temperature))


def _pem(variable: str, what: str) -> Any:
    return typer.Option(
        help=f"{what} To be looked at.", envvar=variable, metavar="FILE", rich_help_panel="Certificates"
    )


@app.command("doctor")
def _doctor(
    model: Annotated[str | None, typer.Option(help="Model folder. Default: the bundled one.", metavar="DIR")] = None,
    url: Annotated[
        str | None, typer.Option(help="A running gateway. Default: the one at --host and --port.", envvar="BATON_URL")
    ] = None,
    api_key: _Key = None,
    ca_file: _Ca = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", envvar="BATON_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="REST port.", envvar="BATON_PORT", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.", envvar="BATON_GRPC_PORT", min=1, max=65535)] = 8001,
    kv_cache_memory: Annotated[str, typer.Option(help="Of each worker.", metavar="SIZE")] = "1GiB",
    tls_cert_file: Annotated[Path | None, _pem("BATON_TLS_CERT_FILE", "Certificate between processes.")] = None,
    tls_key_file: Annotated[Path | None, _pem("BATON_TLS_KEY_FILE", "Its private key.")] = None,
    tls_ca_file: Annotated[Path | None, _pem("BATON_TLS_CA_FILE", "CA of the other processes.")] = None,
    ssl_certfile: Annotated[Path | None, _pem("BATON_SSL_CERTFILE", "Certificate towards clients.")] = None,
    ssl_keyfile: Annotated[Path | None, _pem("BATON_SSL_KEYFILE", "Its private key.")] = None,
    ssl_ca_certs: Annotated[Path | None, _pem("BATON_SSL_CA_CERTS", "CA of clients.")] = None,
    as_json: _Json = False,
) -> int:
    """Check this machine, a model folder, certificates and a running gateway; say how to mend what is wrong."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from baton.services.local.doctor import PemFiles, Questions, doctor
    from baton.services.runtime.net import format_address

    try:
        kv_cache_bytes = TypeAdapter(ByteSize).validate_python(kv_cache_memory)
    except ValidationError:
        raise SettingsError([f"--kv-cache-memory: not a size: {kv_cache_memory}"]) from None
    between = PemFiles(tls_cert_file, tls_key_file, tls_ca_file)
    public = PemFiles(ssl_certfile, ssl_keyfile, ssl_ca_certs)
    url = url or f"{'http' if ssl_certfile is None else 'https'}://{format_address(host, port)}"
    questions = Questions(model, url, api_key, host, port, grpc_port, kv_cache_bytes, between, public)
    return doctor(questions, as_json=as_json)


@app.command("blocks")
def _blocks(
    url: _AdminUrl = "http://127.0.0.1:8000",
    api_key: _AdminKey = None,
    worker: Annotated[str | None, typer.Option(help="Only this worker.", metavar="ID")] = None,
    overdue: Annotated[bool, typer.Option("--overdue", help="Only blocks held past their deadline.")] = False,
    cached: Annotated[bool, typer.Option("--cached", help="Also what is kept as prefix cache.")] = False,
) -> int:
    """Show who holds which KV block: request, peer, phase, age and deadline."""
    from baton.services.local.blocks import show_blocks

    return show_blocks(url, api_key, worker_id=worker, overdue=overdue, cached=cached)


@app.command("drain")
def _drain(
    worker: Annotated[str, typer.Argument(help="The worker's id.", metavar="WORKER")],
    url: _AdminUrl = "http://127.0.0.1:8000",
    api_key: _AdminKey = None,
    timeout_s: _Timeout = 30.0,
) -> int:
    """Take a worker out of use: nothing new, then wait until it holds nothing any more."""
    from baton.services.local.blocks import drain_worker

    return drain_worker(url, api_key, worker, timeout_s)


@app.command("role")
def _role(
    worker: Annotated[str, typer.Argument(help="The worker's id.", metavar="WORKER")],
    role: Annotated[Literal["prefill", "decode"], typer.Argument(help="What it is to do.")],
    url: _AdminUrl = "http://127.0.0.1:8000",
    api_key: _AdminKey = None,
    timeout_s: _Timeout = 30.0,
) -> int:
    """Give a worker another role while it runs."""
    from baton.services.local.blocks import change_role

    return change_role(url, api_key, worker, role, timeout_s)


@app.command("key")
def _new_key(
    tenant: Annotated[str, typer.Argument(help="Who the key is for.", metavar="TENANT")],
) -> int:
    """Make an API key: print it, once, and the entry of the tenants file that lets it in."""
    from baton.services.local.keys import print_new_key

    return print_new_key(tenant)


def main() -> None:
    """Runs a command and exits: 0 done, 1 failed, 2 for options that cannot be used."""
    exit_cleanly_on_signals()
    die_with_parent()
    # gRPC's own library writes to standard error for every connection that ends, unless told not to before its import.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    command = " ".join(["baton", *(argument for argument in sys.argv[1:2] if not argument.startswith("-"))])
    try:
        status = app(prog_name="baton", standalone_mode=False)
    except ConfigurationError as error:
        status = report_problems(command, error)
    except typer.TyperException as error:
        sys.stderr.write(f"{command}: {' '.join(error.format_message().split())}\n")
        status = EXIT_BAD_CONFIGURATION
    sys.exit(status or 0)


if __name__ == "__main__":
    main()
