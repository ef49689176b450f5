"""Text out, for every kind of tokenizer: in sum the whole text, never half a character, never an error, no old work."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from router.doors.http.logprobs import Entry, TokenNames, completion_logprobs
from router.text.detokenizer import ByToken, TokenTexts, Windowed
from router.text.stream import TextStream
from router.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizers import BY_TOKEN, BY_WINDOW, SPECIAL, Counted

KINDS = {name: make() for name, make in (BY_TOKEN | BY_WINDOW).items()}
SENTENCES = (
    "the cat sat on Üb süß naïve 日本",
    "😀😀 the cat, naïve. 日本日本",
    " the  cat\n",
    "👩\u200d👩\u200d👧 x y {",
)


def stream_of(backend: Any, stop: tuple[str, ...] = (), shown: dict[str, int] | None = None) -> TextStream:
    return TextStream(cast(Tokenizer, SimpleNamespace(texts=TokenTexts(backend))), stop, shown=shown)


def streamed(backend: Any, ids: list[int]) -> list[str]:
    stream = stream_of(backend)
    return [*(stream.push(t) for t in ids), stream.flush()]


def whole(backend: Backend, ids: list[int]) -> str:
    return backend.decode(ids, skip_special_tokens=True)


def marked(run: bytes) -> str:
    """Every complete character, and U+FFFD for every other byte."""
    text = ""
    while run:
        for length in (1, 2, 3, 4):
            try:
                text += run[:length].decode()
            except UnicodeDecodeError:
                continue
            run = run[length:]
            break
        else:
            text += "\ufffd"
            run = run[1:]
    return text


def expected_text(backend: Backend, ids: list[int]) -> str:
    """The tokenizer's own word, but that with byte fallback one broken byte does not take its neighbours along."""
    if "ByteFallback" not in str(backend.decoder):
        return whole(backend, ids)
    parts, run = [], bytearray()
    for token in (backend.id_to_token(t) for t in ids):
        if token is None or token in SPECIAL:
            continue
        if token.startswith("<0x"):
            run.append(int(token[3:5], 16))
            continue
        parts += [marked(run), token]
        run.clear()
    return backend.decoder.decode([*parts, marked(run)])


def test_each_kind_takes_the_way_that_is_meant_for_it() -> None:
    for name, backend in KINDS.items():
        assert isinstance(TokenTexts(backend).stream(), ByToken if name in BY_TOKEN else Windowed), name


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("text", SENTENCES)
def test_what_was_encoded_comes_back_in_whole_characters(name: str, text: str) -> None:
    backend = KINDS[name]
    ids = backend.encode(text).ids
    pieces = streamed(backend, ids)
    assert "".join(pieces) == whole(backend, ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", KINDS)
def test_random_tokens_sum_to_the_whole_text(name: str) -> None:
    backend, rng = KINDS[name], random.Random(name)
    for _ in range(300):
        ids = [rng.randrange(backend.get_vocab_size() + 3) for _ in range(rng.randrange(1, 40))]  # also unknown ids
        assert "".join(streamed(backend, ids)) == expected_text(backend, ids), ids


def test_a_broken_byte_is_marked_and_nothing_else() -> None:
    backend = KINDS["sentencepiece_bpe"]
    ids = [backend.token_to_id(t) for t in ("▁the", "<0xE4>", "<0xBD>", "<0xA0>", "<0xFF>", "a", "<0xF0>", "<0x9F>")]
    assert streamed(backend, ids) == ["the", "", "", "你", "\ufffd", "a", "", "", "\ufffd\ufffd"]


@pytest.mark.parametrize("name", ["byte_level_bpe", "sentencepiece_bpe", "byte_fallback_unigram"])
@pytest.mark.parametrize("byte", [0x80, 0xC3, 0xE4, 0xF0, 0xFF])
def test_bytes_that_never_become_a_character_do_not_gather(name: str, byte: int) -> None:
    """A text that stays incomplete costs no more with every token, and goes on after it."""
    backend = KINDS[name]
    texts = TokenTexts(backend)
    token = next(t for t in range(backend.get_vocab_size()) if texts.bytes_of(t) == bytes([byte]))
    counted = Counted(backend)
    stream = stream_of(counted)
    text = "".join(stream.push(token) for _ in range(2000))
    assert len(text) >= 1996
    assert set(text) == {"\ufffd"}
    assert counted.calls == 0
    letter = backend.token_to_id("{")
    assert stream.push(letter).endswith("{")


@pytest.mark.parametrize("name", BY_WINDOW)
def test_a_window_is_all_that_is_decoded_again(name: str) -> None:
    counted = Counted(KINDS[name])
    rng = random.Random(1)
    stream = stream_of(counted)
    same = rng.randrange(2, 8)
    for i in range(500):
        stream.push(same if i < 250 else rng.randrange(counted.get_vocab_size()))
    assert counted.calls <= 3 * 500
    assert counted.longest <= 12


@pytest.mark.parametrize("name", KINDS)
def test_silent_tokens_leave_no_trace(name: str) -> None:
    backend = KINDS[name]
    silent = [backend.token_to_id(t) for t in SPECIAL]
    ids = backend.encode("the cat sat on naïve 日本", add_special_tokens=False).ids
    if name == "ctc":
        ids = [backend.token_to_id(c) for c in "abcdef"]
    between = [t for token in ids for t in (*silent, token)]
    counted = Counted(backend)
    assert "".join(streamed(counted, [*between, *silent * 500])) == whole(backend, ids)
    assert counted.longest <= 12


@pytest.mark.parametrize("name", KINDS)
def test_a_shown_marker_stands_where_it_was(name: str) -> None:
    backend = KINDS[name]
    marker = backend.token_to_id("<tool_call>")
    stream = stream_of(backend, shown={"<tool_call>": marker})
    a, b = (backend.encode(text, add_special_tokens=False).ids for text in ("the cat", "on"))
    if name == "ctc":
        a, b = [2, 3], [4]
    said = "".join([*(stream.push(t) for t in (*a, marker, *b)), stream.flush()])
    before, _, after = said.partition("<tool_call>")
    assert before == whole(backend, a)
    assert after.strip() == whole(backend, b).strip()


def test_a_stop_string_is_found_however_tokens_fall() -> None:
    for name in ("sentencepiece_bpe", "byte_fallback_unigram", "byte_level_bpe", "metaspace_unigram"):
        backend = KINDS[name]
        ids = backend.encode("the cat naïve süß on").ids
        text = whole(backend, ids)
        for stop in ("naïve", "ï", "t n", "ß o"):
            stream, said = stream_of(backend, (stop,)), ""
            for token in ids:
                said += stream.push(token)
                if stream.stopped:
                    break
            assert said == text[: text.index(stop)], (name, stop)


@pytest.mark.parametrize("name", KINDS)
def test_offsets_are_places_in_the_text(name: str) -> None:
    backend = KINDS[name]
    ids = [*backend.encode("the cat, 日本 😀 naïve on").ids, backend.token_to_id("</s>")]
    if name == "ctc":
        ids = [2, 2, 3, 4]
    texts = TokenTexts(backend)
    names = TokenNames(texts)
    entries = [Entry(t, SimpleNamespace(logprob=-1.0, top=[])) for t in ids]
    said = completion_logprobs(entries, names, names.offsets())
    text, lengths, length = whole(backend, ids), [], 0
    for piece in streamed(backend, ids):
        lengths.append(length)
        length += len(piece)
    assert said["text_offset"] == lengths[:-1]
    assert length == len(text)
    assert name == "ctc" or said["text_offset"][-1] == len(text), "what is silent takes no room"


@pytest.mark.parametrize("name", ["byte_level_bpe", "sentencepiece_bpe", "byte_fallback_unigram"])
def test_offsets_behind_broken_characters(name: str) -> None:
    texts = TokenTexts(KINDS[name])
    token_of = {texts.bytes_of(t): t for t in reversed(range(KINDS[name].get_vocab_size()))}
    places = TokenNames(texts).offsets()
    ids = [token_of[part] for part in (b"c", b"\xe4", b"c", b"\xe4", b"\xe4", b"\xbd", b"\xa0", b"\xff", b"c")]
    assert [places.next(t) for t in ids] == [0, 1, 2, 3, 4, 4, 4, 5, 6]


@pytest.mark.parametrize("name", ["byte_level_bpe", "sentencepiece_bpe", "byte_fallback_unigram"])
def test_the_bytes_of_tokens_sum_to_the_text(name: str) -> None:
    backend = KINDS[name]
    names = TokenNames(TokenTexts(backend))
    ids = backend.encode("the cat 日本 😀 naïve").ids
    assert b"".join(names.bytes_of(t) for t in ids).decode().removeprefix(" ") == "the cat 日本 😀 naïve"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("a", "b"), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.WordPiece(), decoders.ByteLevel()]),
    ],
)
def test_a_decoder_that_is_not_known_is_followed_by_a_window(decoder: Any) -> None:
    backend = BY_TOKEN["sentencepiece_bpe"]()
    backend.decoder = decoder
    assert isinstance(TokenTexts(backend).stream(), Windowed)
    rng = random.Random(2)
    for _ in range(50):  # whatever it does, it does not raise
        streamed(backend, [rng.randrange(backend.get_vocab_size()) for _ in range(30)])


def test_special_tokens_and_what_ends_an_answer_are_shown_where_they_are_asked_for() -> None:
    backend = KINDS["byte_level_bpe"]
    cat, mark, dot, end = (backend.token_to_id(token) for token in ("cat", "<|im_start|>", ".", "</s>"))
    tokenizer = cast(Tokenizer, SimpleNamespace(texts=TokenTexts(backend)))

    def shown(ids: list[int], stop: tuple[str, ...] = (), **how: bool) -> str:
        stream = TextStream(tokenizer, stop, ends=(dot, end), **how)
        text = "".join(stream.push(t) for t in ids if not stream.stopped)
        return text + stream.flush()

    assert shown([cat, mark, cat, end], skip_special=False) == "cat<|im_start|>cat"
    assert shown([cat, mark, cat, end], skip_special=False, include_stop=True) == "cat<|im_start|>cat</s>"
    assert shown([cat, mark, cat, end], include_stop=True) == "catcat", "a special token is shown where all are"
    assert shown([cat, dot], skip_special=False) == "cat"
    assert shown([cat, dot], include_stop=True) == "cat."
    assert shown([cat, cat, cat], ("tc", "tca")) == "ca"
    assert shown([cat, cat, cat], ("tca", "tc"), include_stop=True) == "catc", "what had ended it letter by letter"
    assert shown([cat, mark, cat], ("_start|>c",), skip_special=False, include_stop=True) == "cat<|im_start|>c"


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_a_text_that_goes_on_keeps_its_first_blank(kind: str) -> None:
    backend = KINDS[kind]
    tokenizer = cast(Tokenizer, SimpleNamespace(texts=TokenTexts(backend)))
    ids = backend.encode("the cat sat on", add_special_tokens=False).ids
    for at in range(1, len(ids)):
        stream = TextStream(tokenizer, (), goes_on=True)
        rest = "".join(stream.push(t) for t in ids[at:]) + stream.flush()
        assert whole(backend, ids[:at]) + rest == whole(backend, ids)


def test_offsets_count_the_special_tokens_that_are_shown() -> None:
    backend = KINDS["byte_level_bpe"]
    cat, mark = backend.token_to_id("cat"), backend.token_to_id("<|im_start|>")
    names = TokenNames(TokenTexts(backend))
    for skip, expected in ((True, [0, 3, 3, 6]), (False, [0, 3, 15, 18])):
        offsets = names.offsets(skip_special=skip)
        assert [offsets.next(t) for t in (cat, mark, cat, mark)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_with_special_tokens_a_text_is_whole(kind: str) -> None:
    """What it is without them, and the names where they stand."""
    backend = KINDS[kind]
    tokenizer = cast(Tokenizer, SimpleNamespace(texts=TokenTexts(backend)))
    mark = backend.token_to_id("<|im_start|>")
    ids = backend.encode(SENTENCES[0], add_special_tokens=False).ids
    stream = TextStream(tokenizer, (), skip_special=False)
    text = "".join(stream.push(t) for t in [*ids, mark, *ids, mark]) + stream.flush()
    assert text.startswith(f"{whole(backend, ids)}<|im_start|>")
    assert text.endswith("<|im_start|>")
    assert text.count("<|im_start|>") == 2


def test_what_ends_an_answer_is_no_part_of_its_text() -> None:
    """An ordinary token, too; before min_tokens it ends nothing."""
    backend = KINDS["byte_level_bpe"]
    cat, dot, end = (backend.token_to_id(token) for token in ("cat", ".", "</s>"))
    tokenizer = cast(Tokenizer, SimpleNamespace(texts=TokenTexts(backend)))
    stream = TextStream(tokenizer, (), min_tokens=1, ends=(dot, end))
    assert [stream.push(token) for token in (dot, cat, dot)] == [".", "cat", ""]
    assert not stream.flush()
