"""How many blocks running requests are still promised, so that admission grants only what can also grow."""

from __future__ import annotations

from collections.abc import Iterable

from baton.services.core.request import Request
from baton.services.core.scheduler.block_tables import BlockTables, Sequence
from baton.services.core.scheduler.finish import max_kv_tokens
from baton.services.core.scheduler.output_length import OutputLengthEstimator


class GrowthPromises:
    """Turns expected output lengths into blocks. The promise is kept in ``Sequence.promised_blocks``."""

    def __init__(self, tables: BlockTables, output_lengths: OutputLengthEstimator, max_model_len: int) -> None:
        self._tables = tables
        self._output_lengths = output_lengths
        self._max_model_len = max_model_len

    def promise(self, request: Request) -> int:
        """Blocks that the request will probably hold at its end."""
        num_output = self._output_lengths.expected(request.sampling.max_tokens, request.num_output_tokens)
        num_tokens = max(request.num_tokens, request.num_prompt_tokens + num_output - 1)
        return self._tables.num_blocks_for(min(num_tokens, max_kv_tokens(request, self._max_model_len)))

    def outstanding(self, running: Iterable[Sequence], awaiting: Iterable[Sequence]) -> int:
        """Blocks promised and not taken yet. One that has outgrown its promise gets another."""
        num_blocks = 0
        for sequence in running:
            num_held = len(sequence.request.block_table)
            if num_held >= sequence.promised_blocks:
                sequence.promised_blocks = self.promise(sequence.request)
            num_blocks += max(0, sequence.promised_blocks - num_held)
        for sequence in awaiting:
            num_held = self._tables.num_blocks_for(sequence.request.num_tokens)
            num_blocks += max(0, sequence.promised_blocks - num_held)
        return num_blocks
