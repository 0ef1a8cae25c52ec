"""One engine step: a map from requests to numbers of tokens in, sampled tokens out.

Prompt and output tokens are the same thing here: chunked prefill, prefix-cache hits and decoding are all "compute the
tokens [num_computed, num_computed + n)", mixed freely in one flat batch. The step never touches text or sockets and is
not thread-safe: one thread owns an engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.services.core.request import Request, SamplingParams, TokenLogprobs
from baton.services.core.scheduler.base import ScheduledRequest, StepResult
from baton.services.engine.batch import BatchBuilder, OutputPlan, PromptRows
from baton.services.engine.grammar import GrammarCompiler, read_tokenizer
from baton.services.engine.kv_cache import KVCache, KVCacheShape
from baton.services.engine.loader import LoadedModel
from baton.services.engine.logprobs import compute_logprobs
from baton.services.engine.progress import StepProgress
from baton.services.engine.sampler import Sampler
from baton.services.engine.token_masks import TokenMasks

# Prompt logprobs need logits of every prompt token; this many rows at a time keep 2,000 x 150,000 floats off the heap.
_LOGPROB_ROWS = 64


def set_num_threads(num_threads: int) -> None:
    """How many CPU threads a step may use, for the whole process.

    Never more than the cores that this worker has to itself: a thread that waits for its turn stalls all others at every
    barrier, which costs far more than it brings.
    """
    torch.set_num_threads(num_threads)


class Engine:
    """A model and its paged KV cache."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int,
        block_size: int = 16,
        memory: torch.Tensor | None = None,
        trim_last_layer: bool = True,
    ) -> None:
        """``memory``: uint8 bytes to lay the cache in (``KVCache``), for a cache that other processes can map.

        ``trim_last_layer``: compute the last layer, beyond K and V, only for the rows that are sampled from. It saves
        a prompt most of one layer.
        """
        self.model = loaded.model
        self.config = loaded.config
        self.device = loaded.device
        self.shape = KVCacheShape.of(loaded.config, block_size, loaded.dtype)
        self.cache = KVCache(self.shape, num_blocks, device=loaded.device, memory=memory)
        self._builder = BatchBuilder(block_size, loaded.device, trim_last_layer=trim_last_layer)
        self._sampler = Sampler()
        self.grammars = GrammarCompiler(lambda: read_tokenizer(loaded.tokenizer_path), loaded.config.vocab_size)
        self._masks = TokenMasks(self.grammars, loaded.config.vocab_size)

    @property
    def kv_cache(self) -> torch.Tensor:
        """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
        return self.cache.tensor

    @torch.inference_mode()
    def step(self, batch: Sequence[ScheduledRequest]) -> StepResult:
        """Compute each request's next ``num_tokens`` tokens; sample one for those that reach their end.

        Every request is in the batch once, has that many uncomputed tokens and blocks for them. Requests are only read.

        ``prompt_logprobs`` of a request are the entries that this step added: a leading None for the first token, which
        nothing predicts, then one entry per prompt token. A chunked prompt's lists, joined, make the whole; a list
        that begins with None starts anew (the request was preempted).
        """
        if not batch:
            return StepResult({}, {})
        forward_batch, plan = self._builder.build(batch)
        pending_masks = self._masks.begin(plan.sampled)
        hidden = self.model.forward(forward_batch, self.cache)
        prompt_logprobs = {rows.request.request_id: self._prompt_logprobs(hidden, rows) for rows in plan.prompts}
        if not plan.sampled:
            return StepResult({}, prompt_logprobs)
        logits = self.model.logits(_sampled_outputs(hidden, plan))
        masks = None if pending_masks is None else pending_masks.result()
        failed = {} if masks is None else masks.failed
        tokens = self._sampler.sample(logits, plan.sampled, masks)
        sampled = {
            request.request_id: token
            for request, token in zip(plan.sampled, tokens, strict=True)
            if request.request_id not in failed
        }
        return StepResult(sampled, prompt_logprobs, failed)

    @property
    def progress(self) -> StepProgress:
        return self.cache.progress

    def warm_up(self, num_tokens: int = 2) -> None:
        """Compute a prompt and a token, so that no request waits for kernels to be compiled or libraries to be loaded.

        Writes into the first blocks of the cache, which must have room for one token more: call it before they hold anything.
        """
        sampling = SamplingParams(max_tokens=2, top_p=0.9)
        num_blocks = min(num_tokens // self.cache.block_size + 1, self.cache.num_blocks)
        request = Request("warm-up", 0, [0] * num_tokens, num_tokens, sampling, block_table=list(range(num_blocks)))
        for _ in range(sampling.max_tokens):
            num_tokens = request.num_uncomputed_tokens
            token = self.step([ScheduledRequest(request, num_tokens)]).sampled[request.request_id]
            request.num_computed_tokens += num_tokens
            request.token_ids.append(token.token_id)

    def _prompt_logprobs(self, hidden: torch.Tensor, rows: PromptRows) -> list[TokenLogprobs | None]:
        request, result = rows.request, list[TokenLogprobs | None]()
        if rows.first_position == 1:
            result.append(None)
        num_top = request.sampling.num_prompt_logprobs or 0
        for offset in range(0, rows.count, _LOGPROB_ROWS):
            count = min(_LOGPROB_ROWS, rows.count - offset)
            self.progress.num_signs += 1
            logits = self.model.logits(hidden[rows.start + offset : rows.start + offset + count])
            first = rows.first_position + offset
            token_ids = torch.tensor(request.token_ids[first : first + count], device=hidden.device)
            result += compute_logprobs(logits, token_ids, [num_top] * count)
        return result


def _sampled_outputs(hidden: torch.Tensor, plan: OutputPlan) -> torch.Tensor:
    if plan.sampled_outputs is None:
        return hidden
    return hidden[torch.tensor(plan.sampled_outputs, device=hidden.device)]
