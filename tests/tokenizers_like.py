"""Tokenizers that decode in the ways there are: bytes, words after SentencePiece's manner, spaces taken away."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ("time", "there", "was", "a", "girl", "n't", "'s", ".", ",", "\n", "\u4e2d", "\u6587", "caf\u00e9", "<0x41>")


def like_sentencepiece(**options: Any) -> Any:
    """Words that begin with a mark for their space, bytes of unknown characters; the first space of all is not decoded."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    words += [f"\u2581{word}" for word in WORDS[:8]] + [word for word in WORDS if word not in words]
    words += [chr(c) for c in range(97, 123) if chr(c) not in words]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def like_bytes(**options: Any) -> Any:
    """One token per byte, and special ones that no text has."""
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def like_word_pieces() -> Any:
    """Words with a space before each, except pieces that go on with one; spaces before punctuation are taken away."""
    words = ["<s>", "</s>", "<unk>", *WORDS, "##ing", "##s", "'", "'", "do", "re", "'ve", "'m", "!", "?"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "like SentencePiece": like_sentencepiece,
    "like SentencePiece, spaces cleaned up": lambda: like_sentencepiece(clean_up_tokenization_spaces=True),
    "bytes": like_bytes,
    "bytes, spaces cleaned up": lambda: like_bytes(clean_up_tokenization_spaces=True),
    "word pieces": like_word_pieces,
}
