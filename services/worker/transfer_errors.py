"""Failures of a handoff in the words of the rest of the system."""

from __future__ import annotations

from baton.kvtransfer.errors import TransferCode, TransferError
from baton.services.core.errors import BatonError, ErrorCode


def to_baton_error(error: TransferError) -> BatonError:
    """Whatever went wrong with one pair of workers, another attempt elsewhere may succeed: all are retryable."""
    code = ErrorCode.INCOMPATIBLE if error.code is TransferCode.INCOMPATIBLE else ErrorCode.HANDOFF_FAILED
    return BatonError(code, f"KV handoff failed: {error}", retryable=True, cause=error.code.value)
