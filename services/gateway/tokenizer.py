"""The model's tokenizer and chat template. Every call that may take long runs in a small thread pool, off the event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import orjson

from baton.services.core.errors import BatonError, ConfigurationError, ErrorCode
from baton.services.gateway.detokenizer import Detokenizer, create_detokenizer
from baton.services.gateway.token_pieces import TokenPieces

T = TypeVar("T")

# A template that needs longer than this for one short message will hold up every request.
SELF_TEST_TIMEOUT_S = 5.0
_TOKENIZER_THREADS = 2
_MAX_TEMPLATE_REASON_CHARS = 200
# Unicode composition makes one character of at most four in practice.
_MAX_COMPOSED_CHARS = 4


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation becomes a prompt. ``template_kwargs`` reach the template as variables."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] | None = None  # definitions, for the template


class ModelTokenizer:
    """Text to token ids and back. ``tokenizer`` is a transformers fast tokenizer, for its chat template and settings."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Truncation and padding that the folder may have set would change prompts without a word.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.pieces = TokenPieces(self._backend)
        self.has_chat_template = bool(tokenizer.chat_template)
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self.knows_developer_role = "developer" in template
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self._added_prefix, self._added_suffix = self._added_tokens()
        self._max_token_chars = self._longest_token()
        self._pool = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    @property
    def adds_tokens_to_empty_text(self) -> bool:
        """Whether an empty prompt is at least a begin-of-sequence token."""
        return bool(self._added_prefix or self._added_suffix)

    @property
    def chat_template(self) -> str:
        """All of the model's templates, as text to look for signs in."""
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    def rule_of(self, marker: str) -> str:
        """How a grammar writes a marker: as its special token where it is one, else as text."""
        token_id = self._backend.token_to_id(marker)
        return json.dumps(marker) if token_id not in self.pieces.special_ids else f"<[{token_id}]>"

    def special_ids_of(self, markers: Sequence[str]) -> frozenset[int]:
        """Those of the markers that are special tokens."""
        ids = {self._backend.token_to_id(marker) for marker in markers}
        return frozenset(ids - {None}) & self.pieces.special_ids

    def tail(self, token_ids: Sequence[int], num_tokens: int) -> str:
        """The text of the last tokens, special ones shown."""
        return self.pieces.decode(token_ids[-num_tokens:], skip_special_tokens=False)

    def as_json(self) -> str:
        """The tokenizer as a tokenizer.json."""
        return str(self._backend.to_str())

    def close(self) -> None:
        """Ends the threads once they are idle."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int, param: str) -> list[int]:
        """Token ids of ``text``. Text that cannot be ``max_tokens`` tokens or fewer is refused before it is tokenised."""
        self._check_length(text, max_tokens, param)
        return await self._run(lambda: self._encode(text, add_special_tokens))

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions, *, max_tokens: int
    ) -> list[int]:
        """Token ids of a conversation, through the model's chat template, which adds special tokens itself."""

        def work() -> list[int]:
            text = self.render_chat(messages, options)
            self._check_length(text, max_tokens, "messages")
            return self._encode(text, add_special_tokens=False)

        return await self._run(work)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids with special tokens shown, less those that ``encode`` adds by itself: its inverse."""
        return await self._run(lambda: self.pieces.decode(self._without_added(token_ids), skip_special_tokens=False))

    def detokenizer(
        self,
        prompt_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        keep_prompt_text: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """Streams the text of a generation that continues ``prompt_ids``."""
        return create_detokenizer(
            self.pieces,
            prompt_ids,
            skip_special_tokens=skip_special_tokens,
            keep_prompt_text=keep_prompt_text,
            shown_ids=shown_ids,
        )

    def render_chat(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The conversation as the model's prompt text. Takes its time: call it off the event loop."""
        if not self.has_chat_template:
            message = "this model has no chat template; use /v1/completions"
            raise BatonError(ErrorCode.INVALID_REQUEST, message, param="messages")
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tools=None if options.tools is None else list(options.tools),
                **options.template_kwargs,
            )
        except jinja2.exceptions.TemplateError as error:
            # What a template says with raise_exception is meant for people; other errors are about its insides.
            reason = "" if isinstance(error, jinja2.exceptions.TemplateRuntimeError) else f": {error}"
            message = f"the model's chat template refuses these messages{reason[:_MAX_TEMPLATE_REASON_CHARS]}"
            raise BatonError(ErrorCode.INVALID_REQUEST, message, param="messages") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            message = "the model's chat template cannot render these messages"
            raise BatonError(ErrorCode.INVALID_REQUEST, message, param="messages") from error
        return str(rendered)

    def check_chat_template(self, timeout_s: float = SELF_TEST_TIMEOUT_S) -> None:
        """Renders one short conversation. Raises ConfigurationError when that fails, is endless or absurdly long."""
        if not self.has_chat_template:
            return
        outcome: list[str | BaseException] = []

        def work() -> None:
            try:
                outcome.append(self.render_chat([{"role": "user", "content": "Hello"}], ChatOptions()))
            except BaseException as error:
                outcome.append(error)

        # A daemon: a template that never returns must not keep the process alive.
        thread = threading.Thread(target=work, name="chat-template-self-test", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if not outcome:
            raise ConfigurationError(f"the chat template did not finish one short message within {timeout_s:g} s")
        if isinstance(outcome[0], BaseException):
            cause = outcome[0].__cause__ or outcome[0]
            raise ConfigurationError(f"the chat template cannot render one short message: {cause}") from outcome[0]
        if len(outcome[0]) > 1_000_000:
            raise ConfigurationError(f"the chat template makes {len(outcome[0])} characters of one short message")

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call, since it gives up the interpreter lock while it works; the single one does not.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def _check_length(self, text: str, max_tokens: int, param: str) -> None:
        if self._max_token_chars is None:
            return
        least = -(-len(text) // self._max_token_chars)
        if least > max_tokens:
            raise BatonError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"This model's maximum context length is {max_tokens} tokens. However, your prompt of {len(text)} "
                f"characters is at least {least} tokens long. Please shorten it.",
                param=param,
            )

    def _longest_token(self) -> int | None:
        """Characters that one token can stand for; None where that can be any amount of text (unknown words)."""
        if type(self._backend.model).__name__ not in ("BPE", "Unigram") or not self.pieces.can_concatenate:
            return None
        if self._backend.normalizer is not None and _may_shrink(self._backend.normalizer):
            return None
        shrink = 1 if self._backend.normalizer is None else _MAX_COMPOSED_CHARS
        return shrink * max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _added_tokens(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and behind any text by itself."""
        sample = self._backend.encode("a", add_special_tokens=True).ids
        plain = self._backend.encode("a", add_special_tokens=False).ids
        for start in range(len(sample) - len(plain) + 1):
            if sample[start : start + len(plain)] == plain:
                return sample[:start], sample[start + len(plain) :]
        return [], []

    def _without_added(self, token_ids: Sequence[int]) -> Sequence[int]:
        start = len(self._added_prefix) if list(token_ids[: len(self._added_prefix)]) == self._added_prefix else 0
        end = len(token_ids)
        suffix = self._added_suffix
        if suffix and list(token_ids[max(start, end - len(suffix)) :]) == suffix:
            end -= len(suffix)
        return token_ids[start:end]


def _may_shrink(normalizer: Any) -> bool:
    """Whether a normaliser can drop any amount of text; composing characters (NFC) does not count."""
    state = orjson.loads(normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
    return any(
        step["type"] not in ("NFC", "NFD", "Prepend", "Lowercase")
        and not (step["type"] == "Replace" and len(step["content"]) >= len(step["pattern"].get("String", "  ")))
        for step in steps
    )


def load_tokenizer(folder: Path) -> ModelTokenizer:
    """Loads the tokenizer of a model folder and tries its chat template. Never runs code from the folder.

    Raises ConfigurationError that names the file at fault.
    """
    config_path = folder / "tokenizer_config.json"
    if config_path.exists():
        try:
            config = orjson.loads(config_path.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            raise ConfigurationError(f"{config_path} cannot be read: {error}") from error
        if isinstance(config, dict) and config.get("auto_map"):
            raise ConfigurationError(f"{config_path} asks to run code from the folder (auto_map), which is never done")
    tokenizer = ModelTokenizer(_load_fast_tokenizer(folder))
    tokenizer.check_chat_template()
    return tokenizer


def _load_fast_tokenizer(folder: Path) -> Any:
    try:
        if (folder / "tokenizer.json").exists():
            # The file is the whole tokenizer; the generic class takes it as it is (and does not import torch).
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        if not any((folder / name).exists() for name in ("vocab.json", "tokenizer.model", "spiece.model")):
            raise ConfigurationError(f"{folder} has no tokenizer: tokenizer.json is missing")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ConfigurationError:
        raise
    except Exception as error:  # transformers and tokenizers raise bare Exception, among others, for damaged files
        raise ConfigurationError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(f"the tokenizer in {folder} cannot be converted to the fast kind (tokenizer.json)")
    return tokenizer
