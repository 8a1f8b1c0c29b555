"""What every text begins with, as tokenizers of all kinds make it: once, and with nothing behind a prompt."""

import itertools
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pqkv_cli.models.prefix import end_ids, plain_ids, prefix_ids, whole_ids

SPECIAL = ["[gMASK]", "<sop>", "<s>", "</s>", "<unk>"]


def tokenizer(template: str, *, metaspace: bool = False) -> Any:
    """One token per byte or character, and around it what `template` says, ``$A`` being the text."""
    if metaspace:
        words = [*SPECIAL, "\u2581", *(chr(i) for i in range(33, 127))]
        made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(zip(SPECIAL, range(5), strict=True))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", additional_special_tokens=["[gMASK]", "<sop>"]
    )


PREFIXES = {"$A": [], "<s> $A": [2], "[gMASK] <sop> $A": [0, 1], "</s> $A": [3], "[gMASK] <sop> <s> $A": [0, 1, 2]}
ENDS = {"": [], " </s>": [3], " <sop> </s>": [1, 3]}
KINDS = list(itertools.product(PREFIXES, ENDS, (False, True)))


@pytest.mark.parametrize(("front", "behind", "metaspace"), KINDS)
def test_prefix_and_end_are_those_of_the_tokenizer(front: str, behind: str, metaspace: bool) -> None:
    made = tokenizer(front + behind, metaspace=metaspace)
    assert (prefix_ids(made), end_ids(made)) == (PREFIXES[front], ENDS[behind])
    for text in ("a", "one two", "7", "\u00fc", "<s>a", ""):
        plain = made(text, add_special_tokens=False)["input_ids"]
        assert plain_ids(made, text) == plain
        written = 1 if text.startswith("<s>") and PREFIXES[front][-1:] == [2] else 0
        assert whole_ids(made, text) == PREFIXES[front] + plain[written:]


@pytest.mark.parametrize(("front", "behind", "metaspace"), KINDS)
def test_a_prefix_that_is_written_out_is_not_put_twice(front: str, behind: str, metaspace: bool) -> None:
    made, prefix = tokenizer(front + behind, metaspace=metaspace), PREFIXES[front]
    rest = made("user says", add_special_tokens=False)["input_ids"]
    for first in range(len(prefix) + 1):  # templates may write all of it, or only its end
        text = "".join(SPECIAL[i] for i in prefix[first:]) + "user says"
        found = whole_ids(made, text)
        assert found[: len(prefix)] == prefix and not set(found[len(prefix) :]) & {0, 1, 2, 3}
        assert metaspace or found == prefix + rest


class Stubborn:
    """Adds its tokens whether it is told to or not."""

    all_special_ids = (0, 1, 9)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [0, 1, *(ord(letter) for letter in text), 9]}


def test_a_tokenizer_that_cannot_be_told_to_leave_them() -> None:
    assert (prefix_ids(Stubborn()), end_ids(Stubborn())) == ([0, 1], [9])
    assert plain_ids(Stubborn(), "ab") == [97, 98]
    assert whole_ids(Stubborn(), "ab") == [0, 1, 97, 98]


def test_letters_that_are_unknown_are_no_prefix() -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    known = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")
    assert prefix_ids(known) == []
    assert plain_ids(known, "one two") == [0, 0]
