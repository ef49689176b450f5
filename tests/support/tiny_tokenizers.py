"""Tokenizers of every kind that checkpoints come with, a few hundred tokens each, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

WORDS = ("the", "cat", "sat", "on", "Üb", "süß", "naïve", "日本", "😀", "a", "n't", ".", ",", "{", "\n", "x y")
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool_call>")
_BYTE_FALLBACK = tuple(f"<0x{b:02X}>" for b in range(256))


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("two words", normalized=False)])
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    """GPT-2, Llama 3, Qwen, and most since."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges, tokens = [], list(alphabet)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in (*WORDS, *(f" {w}" for w in WORDS)):
        [(spelt, _)] = level.pre_tokenize_str(word)
        for end in range(2, len(spelt) + 1):
            if spelt[:end] not in tokens:
                tokens.append(spelt[:end])
                merges.append((spelt[: end - 1], spelt[end - 1]))
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer)


def sentencepiece_bpe() -> Tokenizer:
    """Llama 2, Mistral, Phi 3: blanks as ▁, one in front of the text, and bytes for what is not in the vocabulary."""
    letters = sorted({c for w in WORDS for c in w if c != " " and ord(c) < 0x3000})
    tokens = ["<unk>", *_BYTE_FALLBACK, "▁", *letters]
    merges = []
    for word in (f"▁{w}" for w in WORDS if " " not in w and all(c in letters for c in w)):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(tokenizer)


def byte_fallback_unigram() -> Tokenizer:
    """Gemma: blanks as ▁, none in front, bytes for the rest."""
    letters = sorted({c for w in WORDS for c in w if c != " " and ord(c) < 0x3000})
    pieces = [("<unk>", 0.0), *((b, -9.0) for b in _BYTE_FALLBACK), ("▁", -3.0), ("\ufffd", -9.0)]
    pieces += [(c, -5.0) for c in letters] + [(f"▁{w}", -2.0) for w in WORDS if " " not in w]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_added(tokenizer)


def metaspace_unigram() -> Tokenizer:
    """T5, XLM-R."""
    letters = sorted({c for w in WORDS for c in w if c != " "})
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁▁", -3.0)]
    pieces += [(c, -5.0) for c in letters] + [(f"▁{w}", -2.0) for w in WORDS if " " not in w]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_added(tokenizer)


def wordpiece() -> Tokenizer:
    """BERT."""
    letters = sorted({c for w in WORDS for c in w if not c.isspace()})
    words = [w for w in WORDS if not any(c.isspace() for c in w)]
    tokenizer = Tokenizer(
        models.WordPiece(_numbered(["[UNK]", *letters, *(f"##{c}" for c in letters), *words]), unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_added(tokenizer)


def suffix_bpe() -> Tokenizer:
    """GPT-1, CLIP: a token says where its word ends, so that what it becomes depends on the next."""
    letters = sorted({c for w in WORDS for c in w if not c.isspace()})
    tokens = ["<unk>", *letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>"]
    merges = [("c", "a"), ("ca", "t</w>")]
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    return _with_added(tokenizer)


def ctc() -> Tokenizer:
    """Repeated tokens are one: a text may stand still for as long as the model likes."""
    tokenizer = Tokenizer(models.WordLevel(_numbered(["<pad>", "|", *"abcdefgh"]), unk_token="<pad>"))
    tokenizer.decoder = decoders.CTC()
    return _with_added(tokenizer)


def no_decoder() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(_numbered(["[UNK]", *WORDS]), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _with_added(tokenizer)


BY_TOKEN: dict[str, Callable[[], Tokenizer]] = {
    "byte_level_bpe": byte_level_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "byte_fallback_unigram": byte_fallback_unigram,
    "metaspace_unigram": metaspace_unigram,
    "wordpiece": wordpiece,
}
BY_WINDOW: dict[str, Callable[[], Tokenizer]] = {"suffix_bpe": suffix_bpe, "ctc": ctc, "no_decoder": no_decoder}


class Counted:
    """A backend that counts what is asked of it: calls of decode, and tokens in them."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self.calls = 0
        self.tokens = 0
        self.longest = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        self.calls += 1
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
