import pytest

from pqkv_cli.calibration.stdlib_text import SPLITS, ngram_hashes, overlap_share, split_documents, split_of, stdlib_text


def test_no_run_of_13_words_is_shared_by_two_splits() -> None:
    hashes = {}
    for split in SPLITS:
        hashes[split] = set()
        for document in split_documents(split):
            hashes[split] |= ngram_hashes(document)
        assert len(hashes[split]) > 5000
    assert hashes["train"].isdisjoint(hashes["calibration"])
    assert hashes["train"].isdisjoint(hashes["evaluation"])
    assert hashes["calibration"].isdisjoint(hashes["evaluation"])


def test_the_broad_text_is_all_that_evaluation_leaves() -> None:
    assert stdlib_text("broad") == "\n\n".join([*split_documents("train"), *split_documents("calibration")])
    assert len(stdlib_text("broad")) > 10 * len(stdlib_text("calibration"))


def test_a_document_has_one_split_for_ever() -> None:
    assert [split_of(name) for name in ("pdb.py", "topic:dict", "asyncio/locks.py", "os.py")] == [
        "calibration",
        "calibration",
        "evaluation",
        "train",
    ]
    with pytest.raises(ValueError, match="expected one of train, calibration, evaluation"):
        split_documents("test")


def test_overlap_is_found_whatever_the_case_and_punctuation() -> None:
    text = stdlib_text("evaluation")[:3000]
    assert overlap_share(text, [text.upper().replace(" ", ",  ")]) == 1.0
    assert overlap_share(text, ["something else entirely " * 20]) == 0.0
    assert overlap_share("too short", [text]) == 0.0
