"""Streamed text is the decoding of all tokens, whatever the tokenizer and wherever characters are cut."""

from __future__ import annotations

import functools

import pytest
from helpers import tiny_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from baton.services.gateway.detokenizer import PieceDetokenizer, WindowDetokenizer, create_detokenizer
from baton.services.gateway.token_pieces import TokenPieces

PIECE_KINDS = ["byte_level", "metaspace", "byte_fallback"]
AWKWARD = "👩‍👩‍👧 e\u0301 שלום\r\n\tнет  你好 \ufffd \x00 🇩🇪"

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
quick = settings(max_examples=60, deadline=None)


@functools.cache
def backend(kind: str) -> Tokenizer:
    return tiny_tokenizers.load(kind)


@functools.cache
def pieces(kind: str) -> TokenPieces:
    return TokenPieces(backend(kind))


def encode(kind: str, text: str) -> list[int]:
    return list(backend(kind).encode(text, add_special_tokens=False).ids)


def stream(
    kind: str, ids: list[int], prompt: list[int] | None = None, *, skip: bool = True, echo: bool = False
) -> list[str]:
    """The deltas of each token and of the end."""
    detokenizer = create_detokenizer(pieces(kind), prompt or [], skip_special_tokens=skip, keep_prompt_text=echo)
    return [detokenizer.prompt_text, *(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, backend(kind).get_vocab_size() - 1), max_size=30)


@pytest.mark.parametrize("kind", [*PIECE_KINDS, "whole_words"])
@given(text=texts)
@example(text=AWKWARD)
@quick
def test_text_comes_out_as_the_tokenizer_decodes_it(kind: str, text: str) -> None:
    ids = encode(kind, text)
    assert "".join(stream(kind, ids)) == backend(kind).decode(ids)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "whole_words"])
@given(data=st.data())
@quick
def test_any_token_ids_come_out_as_the_tokenizer_decodes_them(kind: str, skip: bool, data: st.DataObject) -> None:
    ids = data.draw(ids_of(kind))
    assert "".join(stream(kind, ids, skip=skip)) == backend(kind).decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", [*PIECE_KINDS, "whole_words"])
@given(data=st.data())
@quick
def test_tokens_pushed_together_read_as_they_do_one_by_one(kind: str, skip: bool, data: st.DataObject) -> None:
    """Characters that are cut between tokens, special tokens, and pushes of one in between."""
    word = st.sampled_from(encode(kind, AWKWARD) + encode(kind, "plain words and more"))
    ids = st.lists(st.one_of(word, st.integers(0, backend(kind).get_vocab_size() - 1)), max_size=12)
    prompt = data.draw(ids)
    together = create_detokenizer(pieces(kind), prompt, skip_special_tokens=skip)
    one_by_one = create_detokenizer(pieces(kind), prompt, skip_special_tokens=skip)
    for batch in data.draw(st.lists(ids, max_size=6)):
        if len(batch) == 1 and data.draw(st.booleans()):
            assert together.push(batch[0]) == one_by_one.push(batch[0])
        else:
            assert together.push_each(batch) == [one_by_one.push(token_id) for token_id in batch]
    assert together.flush() == one_by_one.flush()


@given(data=st.data())
@quick
def test_byte_tokens_that_are_no_utf8_spoil_only_themselves(data: st.DataObject) -> None:
    """Where a run of byte tokens is valid the tokenizer agrees; elsewhere it gives up the whole run, and this does not."""
    ids = data.draw(ids_of("byte_fallback"))
    raw = b"".join(map(pieces("byte_fallback").piece, (i for i in ids if i not in pieces("byte_fallback").special_ids)))
    expected = raw.decode(errors="replace").removeprefix(" ")
    assert "".join(stream("byte_fallback", ids)) == expected
    if "\ufffd" not in expected:
        assert expected == backend("byte_fallback").decode(ids)


@pytest.mark.parametrize("kind", PIECE_KINDS)
@given(text=texts, cut=st.integers(0, 200))
@example(text=AWKWARD, cut=5)
@quick
def test_output_continues_the_prompt_wherever_it_is_cut(kind: str, text: str, cut: int) -> None:
    """Prompt and output together are the text; a leading space survives, a cut character comes whole."""
    ids = encode(kind, text)
    prompt, output = ids[: cut % (len(ids) + 1)], ids[cut % (len(ids) + 1) :]
    assert "".join(stream(kind, output, prompt, echo=True)) == backend(kind).decode(ids)
    shown = "".join(stream(kind, output, prompt))
    assert backend(kind).decode(ids).endswith(shown)


@pytest.mark.parametrize("kind", PIECE_KINDS)
@given(text=texts)
@example(text=AWKWARD)
@quick
def test_a_character_is_never_sent_in_parts(kind: str, text: str) -> None:
    """No delta has a replacement character that the text itself has not."""
    ids = encode(kind, text)
    whole = backend(kind).decode(ids)
    assert sum(delta.count("\ufffd") for delta in stream(kind, ids)) == whole.count("\ufffd")


def test_an_unfinished_character_is_one_replacement_at_the_end() -> None:
    ids = encode("byte_level", "🦜")
    assert len(ids) > 1
    assert stream("byte_level", ids[:-1]) == [""] * len(ids) + ["\ufffd"]


def test_the_prompts_half_character_does_not_leak() -> None:
    parrot, letter = encode("byte_level", "🦜"), encode("byte_level", "a")
    assert "".join(stream("byte_level", letter, parrot[:-1])) == "a"
    assert "".join(stream("byte_level", [], parrot[:-1])) == ""
    assert "".join(stream("byte_level", parrot[-1:], parrot[:-1])) == "🦜"


def test_special_tokens_are_hidden_or_shown() -> None:
    ids = [*encode("byte_level", "hi"), *encode("byte_level", "<|im_end|>"), *encode("byte_level", " there")]
    assert "".join(stream("byte_level", ids)) == "hi there"
    assert "".join(stream("byte_level", ids, skip=False)) == "hi<|im_end|> there"


@pytest.mark.parametrize("kind", ["metaspace", "byte_fallback"])
def test_a_leading_space_is_text_behind_text_and_nothing_behind_a_start_token(kind: str) -> None:
    ids = encode(kind, "the dog")
    start = [backend(kind).token_to_id("<s>")]
    assert "".join(stream(kind, ids, start)) == "the dog"
    assert "".join(stream(kind, ids, [*start, *ids])) == " the dog"


def test_last_piece_is_what_the_token_contributed() -> None:
    detokenizer = create_detokenizer(pieces("byte_level"), [])
    ids = encode("byte_level", AWKWARD)
    contributed = []
    for token_id in ids:
        detokenizer.push(token_id)
        contributed.append(detokenizer.last_piece)
    assert b"".join(contributed).decode() == AWKWARD


def test_the_kind_follows_the_decoder() -> None:
    assert isinstance(create_detokenizer(pieces("byte_level"), []), PieceDetokenizer)
    assert isinstance(create_detokenizer(pieces("whole_words"), []), WindowDetokenizer)


def test_window_gives_up_on_bytes_that_never_make_a_character() -> None:
    """A stream of garbage still flows."""
    detokenizer = WindowDetokenizer(pieces("byte_level"), [])
    garbage = backend("byte_level").token_to_id("ÿ")  # byte 0xFF
    deltas = [detokenizer.push(garbage) for _ in range(2 * WindowDetokenizer.MAX_HELD_TOKENS)]
    assert "".join(deltas) == "\ufffd" * len(deltas)
