"""What a worker's settings, its model and its pool allow, for the parts that keep to it."""

from __future__ import annotations

import structlog

from baton.kvtransfer.options import TransferOptions
from baton.kvtransfer.shape import LinkShape
from baton.services.core.errors import ConfigurationError
from baton.services.core.quarantine import QuarantineBudget
from baton.services.core.scheduler.base import SchedulerLimits
from baton.services.engine.loader import LoadedModel
from baton.services.runtime.cores import num_cores, transfer_threads
from baton.services.runtime.settings import WorkerSettings

log = structlog.get_logger(__name__)


def make_limits(settings: WorkerSettings, loaded: LoadedModel, num_blocks: int) -> SchedulerLimits:
    """For the scheduler. Raises ConfigurationError for a context that model or pool cannot hold."""
    longest = loaded.config.max_position_embeddings
    if settings.max_model_len is not None and settings.max_model_len > longest:
        raise ConfigurationError(
            f"--max-model-len {settings.max_model_len} is above the model's own limit of {longest} tokens"
        )
    max_model_len = settings.max_model_len or longest
    capacity = num_blocks * settings.block_size
    if max_model_len > capacity:
        if settings.max_model_len is not None:
            raise ConfigurationError(
                f"--kv-cache-memory {settings.kv_cache_memory.human_readable()} holds {capacity} tokens, fewer than "
                f"--max-model-len {max_model_len}: give more memory or a smaller length"
            )
        log.warning("context shortened to what the KV cache holds", model=max_model_len, tokens=capacity)
        max_model_len = capacity
    return SchedulerLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
        max_model_len=max_model_len,
    )


def allowed_transports(settings: WorkerSettings) -> str | tuple[str, ...]:
    """``--transport``; under TLS ``auto`` leaves out what does not encrypt. shm and cuda_ipc do not leave the machine."""
    if settings.transport != "auto" or settings.tls_cert_file is None or settings.allow_unencrypted_kv:
        return settings.transport
    return ("auto", "-nixl")


def make_transfer_options(settings: WorkerSettings, budget: QuarantineBudget) -> TransferOptions:
    """For the transfer agent."""
    shape = None
    if settings.kv_link_mb_per_s is not None:
        shape = LinkShape(settings.kv_link_mb_per_s * 1e6, settings.kv_link_latency_ms / 1e3)
    num_send_threads, num_copy_threads = transfer_threads(num_cores())
    return TransferOptions(
        link_shape=shape,
        max_num_quarantined=budget.max_num_blocks,
        num_send_threads=num_send_threads,
        num_copy_threads=num_copy_threads,
    )
