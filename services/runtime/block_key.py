"""The secret that keys block names: the same for every worker and gateway of a cluster."""

from __future__ import annotations

import hashlib

import structlog

from baton.services.runtime.settings import BusSettings

log = structlog.get_logger(__name__)


def read_block_key(settings: BusSettings) -> bytes:
    """The key in ``block_key_file``; without one a key that only keeps clusters apart, which anybody could compute."""
    if settings.block_key_file is not None:
        return settings.block_key_file.read_bytes()
    log.warning("no --block-key-file: block names can be guessed by whoever knows the cluster's name")
    return hashlib.blake2b(settings.cluster.encode(), digest_size=32, person=b"baton-blocks").digest()
