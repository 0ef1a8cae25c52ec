"""The bus that a process's settings ask for."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from baton.services.runtime.bus import Bus, NatsBus, NoBus
from baton.services.runtime.certificates import load_ca
from baton.services.runtime.settings import BusSettings
from baton.services.runtime.tls import internal_files


def make_bus(settings: BusSettings, name: str) -> Bus:
    """Not connected yet. ``name`` is what the server shows its operators."""
    if settings.nats_url is None:
        return NoBus()
    token = settings.nats_token_file.read_text().strip() if settings.nats_token_file else None
    return NatsBus(settings.nats_url, name=name, token=token, tls=_tls(settings))


def _tls(settings: BusSettings) -> Callable[[], ssl.SSLContext] | None:
    """Made anew for each connection, with the files of then. None: no server of them is spoken to with TLS."""
    if settings.nats_url is None or "tls://" not in settings.nats_url:
        return None
    ca, files = settings.nats_ca_file or settings.tls_ca_file, internal_files(settings)

    def make() -> ssl.SSLContext:
        if ca is None:
            context = ssl.create_default_context()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            load_ca(context, ca)
        if files is not None:
            context.load_cert_chain(files.certificate, files.key)
        return context

    return make
