import math
from typing import Any

import pytest

from pqkv_cli.errors import UsageError
from pqkv_cli.gates import judge, parse_gate, parse_gates, split_gates, values_at


def record(task: str = "perplexity", mode: str = "all", **metrics: Any) -> dict[str, Any]:
    shown = {
        "kl_bits": {"quantized": 0.02, "p99": 0.3},
        "perplexity": {"baseline": 5.0, "quantized": 5.1, "recovery": 5.0 / 5.1, "ci95": [0.9, 1.0]},
        "accuracy@512": {"baseline": 0.0, "quantized": 0.0, "recovery": None},
        "grid": [{"depth": 0}],
    }
    return {"task": task, "mode": mode, "metrics": {**shown, **metrics}, "bits_per_channel": {"total": 4.1}}


@pytest.mark.parametrize(
    ("text", "task", "mode", "path", "relation", "bound"),
    [
        ("perplexity.kl_bits<=0.02", "perplexity", None, "kl_bits", "<=", 0.02),
        ("longbench.hotpotqa>=97%", "longbench", None, "hotpotqa", ">=", 0.97),
        (" longbench[cache].repobench-p.quantized > 1e1 ", "longbench", "cache", "repobench-p.quantized", ">", 10),
        ("*.accuracy@512<.5", "*", None, "accuracy@512", "<", 0.5),
        ("niah_single_1.acc>=-1", "niah_single_1", None, "acc", ">=", -1),
    ],
)
def test_what_a_gate_says(text: str, task: str, mode: str | None, path: str, relation: str, bound: float) -> None:
    gate = parse_gate(text)
    assert (gate.task, gate.mode, gate.path, gate.relation) == (task, mode, path, relation)
    assert gate.bound == pytest.approx(bound)
    assert " " not in gate.text


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("kl_bits<=0.02", "is not understood; expected TASK.METRIC"),
        ("perplexity.kl_bits=0.02", "one of <=, >=, <, >"),
        ("perplexity.kl_bits<=nan", "is not understood"),
        ("perplexity.kl_bits<=", "is not understood"),
        ("perplexity[al].kl_bits<=1", "did you mean 'all'"),
        ("*.recovery>=95", "asks for a recovery of 95; expected a share such as 0.99 or 99%"),
    ],
)
def test_gates_that_are_none(text: str, phrase: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "contradict"),
    [
        (("p.kl<=0.01", "p.kl>=0.02"), True),
        (("p.kl<0.01", "p.kl>=0.01"), True),
        (("p.kl<=0.01", "p.kl>=0.01"), False),
        (("p.kl<=0.01", "p.kl<=0.02"), False),
        (("*.kl<=0.01", "p[all].kl>0.02"), True),
        (("p[all].kl<=0.01", "p[cache].kl>=0.02"), False),
        (("p.kl<=0.01", "q.kl>=0.02"), False),
        (("p.kl<=0.01", "p.kl.p99>=0.02"), False),
        (("p.score<=90%", "p.score.recovery>=97%"), True),
        (("p.score.quantized<=0.9", "p.score.recovery>=0.97"), False),
    ],
)
def test_gates_that_cannot_hold_together(texts: tuple[str, ...], contradict: bool) -> None:
    if not contradict:
        assert len(parse_gates(texts)) == 2
        return
    with pytest.raises(UsageError, match="cannot hold together; give up one of them"):
        parse_gates(texts)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("kl_bits", {"kl_bits.quantized": 0.02}),
        ("kl_bits.p99", {"kl_bits.p99": 0.3}),
        ("perplexity", {"perplexity.recovery": 5 / 5.1}),
        ("perplexity.quantized", {"perplexity.quantized": 5.1}),
        ("perplexity.increase", {"perplexity.increase": 0.02}),
        ("bits_per_channel.total", {"bits_per_channel.total": 4.1}),
        ("accuracy@512", {"accuracy@512.recovery": None}),
        ("recovery", {"perplexity.recovery": 5 / 5.1, "accuracy@512.recovery": None}),
        ("grid", {}),
        ("kl_bits.p9", {}),
        ("perplexity.ci95", {}),
        ("task", {}),
    ],
)
def test_what_a_path_names(path: str, expected: dict[str, float | None]) -> None:
    found = values_at(record(), path)
    assert found.keys() == expected.keys()
    assert [v for v in found.values() if v is not None] == pytest.approx([v for v in expected.values() if v is not None])


def test_headline_metrics_alone_answer_for_a_recovery() -> None:
    judged = {**record(), "headline": ["perplexity"]}
    assert values_at(judged, "recovery") == {"perplexity.recovery": 5 / 5.1}


@pytest.mark.parametrize(
    ("text", "passes", "phrase"),
    [
        ("perplexity.kl_bits<=0.02", True, ""),
        ("perplexity.kl_bits<0.02", False, "perplexity (all): kl_bits.quantized is 0.02; expected < 0.02"),
        ("perplexity.perplexity.increase<=1%", False, "perplexity.increase is 0.02; expected <= 0.01"),
        ("perplexity.perplexity.increase<=2.1%", True, ""),
        ("perplexity.accuracy@512>=0", False, "accuracy@512.recovery is undefined (the uncompressed model scores 0)"),
        ("perplexity.kl_bit<=1", False, "has no kl_bit (did you mean 'kl_bits'?)"),
        ("*.bits_per_channel.total<=4.2", True, ""),
    ],
)
def test_verdicts(text: str, passes: bool, phrase: str) -> None:
    (judged,) = judge([parse_gate(text)], [record()])
    assert judged["gate"]["passed"] == passes
    assert judged["gate"]["checked"] == [text]
    assert phrase in " ".join(judged["gate"]["failed"])
    assert judged["metrics"] == record()["metrics"]


def test_any_task_means_those_that_measure_it() -> None:
    plain = {"task": "passkey", "mode": "all", "metrics": {"accuracy": {"baseline": 1.0, "quantized": 0.5, "recovery": 0.5}}}
    first, second = judge([parse_gate("*.kl_bits<=0.01")], [record(), plain])
    assert (first["gate"]["passed"], second["gate"]["passed"], second["gate"]["checked"]) == (False, True, [])
    (alone,) = judge([parse_gate("*.kl_bits<=0.01")], [plain])
    assert "passkey (all) has no kl_bits" in alone["gate"]["failed"][0]


def test_a_number_that_is_none_fails() -> None:
    (judged,) = judge([parse_gate("perplexity.kl_bits<=1")], [record(kl_bits={"quantized": math.nan})])
    assert not judged["gate"]["passed"]


def test_gates_on_what_is_not_evaluated_are_told_apart() -> None:
    gates = parse_gates(["perplexity.kl_bits<=1", "passkey[cache].accuracy>=0.9", "*.recovery>=0.9"])
    judged, idle = split_gates(gates, ["perplexity", "passkey"], ["all"])
    assert [gate.text for gate in judged] == ["perplexity.kl_bits<=1", "*.recovery>=0.9"]
    assert [gate.text for gate in idle] == ["passkey[cache].accuracy>=0.9"]


NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "no codes": (
        {"mode": "cache", "bits_per_channel": {"total": 32.0, "codes": 0.0}, "cache_bytes": {"num_tokens": 60}},
        "no token was read as a code, because the longest text of 60 tokens lies in the exact window or was only read",
    ),
    "codes that nobody read": (
        {"mode": "cache", "bits_per_channel": {"total": 9.0, "codes": 2.0}, "cache_bytes": {"num_read_as_codes": 0}},
        "no token was read as a code, because the longest text of few tokens",
    ),
    "no cache": ({"mode": "cache", "cache_bytes": {"num_tokens": 0}}, "no token was read as a code"),
    "no sample": ({"settings": {"num_tokens": 0}}, "no sample was scored"),
    "no result of a sample": (
        {"metrics": {"perplexity": {"baseline": None, "quantized": None, "recovery": None}}, "headline": ["perplexity"]},
        "perplexity",
    ),
    "not a number": (
        {"metrics": {"perplexity": {"baseline": 5.0, "quantized": math.nan, "recovery": math.nan}}},
        "is nan, no finite number",
    ),
    "infinite": (
        {"metrics": {"perplexity": {"baseline": 5.0, "quantized": math.inf, "recovery": -math.inf}}},
        "inf, no finite number",
    ),
    "no metrics": ({"metrics": {}}, "perplexity ("),
}
GATES = (
    "*.recovery>=1%",
    "*.recovery<=2",
    "perplexity.perplexity>=0",
    "perplexity.perplexity.quantized<=9e9",
    "perplexity.perplexity.increase<=9e9",
    "perplexity.perplexity.increase>=-9",
    "*.perplexity>=-9",
)


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("text", GATES)
def test_no_gate_is_met_by_what_was_not_measured(name: str, text: str) -> None:
    changes, phrase = NOTHING[name]
    (judged,) = judge([parse_gate(text)], [{**record(), **changes}])
    assert (judged["gate"]["passed"], judged["gate"]["checked"]) == (False, [text])
    assert phrase in " ".join(judged["gate"]["failed"])


def test_a_gate_on_the_record_is_not_met_by_nothing_either() -> None:
    changes, phrase = NOTHING["no codes"]
    (judged,) = judge([parse_gate("*.bits_per_channel.total<=99")], [{**record(), **changes}])
    assert phrase in " ".join(judged["gate"]["failed"])
    assert "measure in --mode all; *.bits_per_channel.total<=99 cannot be met so" in " ".join(judged["gate"]["failed"])


def test_a_gate_on_another_mode_than_was_measured_is_not_met() -> None:
    (judged,) = judge([parse_gate("perplexity[cache].kl_bits<=9")], [record()])
    assert judged["gate"]["failed"] == [
        "perplexity (all) is no result in mode cache, which perplexity[cache].kl_bits<=9 judges; name the mode all or none"
    ]
    both = judge([parse_gate("perplexity[cache].kl_bits<=9")], [record(), record(mode="cache")])
    assert [(each["gate"]["passed"], each["gate"]["checked"] != []) for each in both] == [(True, False), (True, True)]


def test_what_was_measured_meets_gates_in_mode_cache() -> None:
    held = {"mode": "cache", "bits_per_channel": {"total": 5.0, "codes": 3.0}}
    for counts in ({}, {"cache_bytes": {"num_tokens": 300, "num_read_as_codes": 128}, "settings": {"num_tokens": 9}}):
        (judged,) = judge([parse_gate("perplexity.kl_bits<=9")], [{**record(), **held, **counts}])
        assert judged["gate"]["passed"]
