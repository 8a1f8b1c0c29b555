"""How texts begin that a model writes for its own calibration, and in which order. Knows no models and no tokenizers."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

CODE = (
    '"""Reads measurements of <field> from a file and sums them by day."""\n\nimport csv\nfrom pathlib import Path\n\n\n'
    "def read_rows(path: Path)",
    "class <name>Queue:\n    def __init__(self, limit=<number>):\n",
    "import torch\nfrom torch import nn\n\n\nclass Attention(nn.Module):\n",
    "// Keeps the last <number> events in memory.\nexport class EventLog {\n  private readonly entries: Entry[] = [];\n",
    "#include <stdio.h>\n#include <stdlib.h>\n\nstruct node {\n    int value;\n    struct node *next;\n};\n\n",
    "#include <vector>\n#include <algorithm>\n\ntemplate <typename T>\nclass Heap {\npublic:\n",
    'package main\n\nimport (\n\t"fmt"\n\t"net/http"\n)\n\nfunc main() {\n',
    "use std::collections::HashMap;\n\n/// Counts words of a text.\n"
    "pub fn count_words(text: &str) -> HashMap<String, usize> {\n",
    "public class OrderService {\n    private final OrderRepository orders;\n\n",
    "SELECT c.name, SUM(o.amount) AS total\nFROM customers c\nJOIN orders o ON o.customer_id = c.id\n",
    "CREATE TABLE <field>_readings (\n    id BIGINT PRIMARY KEY,\n",
    "#!/bin/sh\n# Saves the folder of <name> and removes copies older than <number> days.\nset -eu\n\n",
    "import React, { useState } from 'react';\n\nexport function <name>Form({ onSubmit }) {\n  const [values, setValues] =",
    "def test_the_<thing>_is_empty_at_first():\n",
    "diff --git a/src/<thing>.py b/src/<thing>.py\n--- a/src/<thing>.py\n+++ b/src/<thing>.py\n@@ -<number>,7 +<number>,9 @@",
)

FORMS = (
    '{\n  "id": <number>,\n  "name": "<name>",\n  "address": {\n    "city": "<place>",\n',
    '[\n  {"date": "2021-03-04", "station": "<place>", "temperature": 11.<number>, "',
    '{"type": "function", "function": {"name": "find_<thing>", "description": "Finds a <thing> near a place", "parameters": {',
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "<place>", "days": <number>}}\n'
    "</tool_call>\n<tool_response>\n{",
    '<?xml version="1.0" encoding="UTF-8"?>\n<orders>\n  <order id="<number>">\n    <customer>',
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n  <title>The <thing> of <place></title>\n',
    "| Town | People | Founded | River |\n|---|---|---|---|\n| <place> | <number>,000 | 1",
    "# <thing>\n\n## Installation\n\n```sh\n",
    "name: build\non:\n  push:\n    branches: [main]\njobs:\n  test:\n    steps:\n",
    "date,station,wind,rain\n2020-01-01,<place>,<number>,0.4\n2020-01-02,",
    '192.168.0.<number> - - [12/May/2022:10:14:33 +0000] "GET /<thing>/<number> HTTP/1.1" 200 5123\n',
    'Traceback (most recent call last):\n  File "/app/<thing>.py", line <number>, in <module>\n',
)


PROSE = (
    "The old <thing> at the edge of <place> had not been used for <number> years when <name>",
    "# A short history of <field>\n\nFew people who look at <field> today ask how",
    "<place>, Tuesday. The council decided last night to close the road to the <thing>, after",
    "Dear <name>,\n\nThank you for your message about the <thing>. I have looked into it and",
    "How to repair a <thing> at home\n\nYou will need",
    "Abstract. We study how <field> change over <number> years in the region around <place>. Our results",
    "The <thing> (from an older word for something carried) is a kind of",
    "I bought this <thing> in March and have used it nearly every day since. The good things first:",
    '"You cannot mean that," said <name>, and put the <thing> back on the table.',
    "Section <number>. Obligations of the tenant. The tenant shall",
    "Ingredients for <number> people: flour, butter, two eggs,",
    "The lecture today is about <field>. Before we begin, remember what we said last week:",
    "Minutes of the meeting on <field>. Present: <name>, <name>, <name>. 1. Report of the",
)

LANGUAGES = (
    "Der alte Brunnen stand seit <number> Jahren im Hof, und niemand in <place> wusste mehr, wer ihn",
    "Sehr geehrte Damen und Herren,\n\nvielen Dank für Ihre Anfrage vom Montag. Leider müssen wir Ihnen",
    "Quand <name> est arrivée à <place>, il pleuvait depuis <number> jours et",
    "Le conseil municipal de <place> a décidé hier soir de",
    "La primera vez que <name> vio el mar tenía <number> años y",
    "Para preparar esta receta se necesitan <number> gramos de harina,",
    "La città di <place> è conosciuta soprattutto per",
    "Gentile <name>, le scrivo a proposito della",
    "A cidade de <place> fica perto do rio e tem cerca de <number> mil habitantes. Durante o",
    "Когда <name> приехал в город, было уже темно, и",
    "История этого моста началась <number> лет назад, когда",
    "那天早上,城里下着大雨,老师走进教室,对学生们说:",
    "这座城市位于河流的北岸,有<number>年的历史,",
    "昔、山の近くの小さな村に、一人の若い大工が住んでいました。ある日、",
    "어느 날 아침, 작은 마을의 시장에서",
    "في صباح يوم من أيام الشتاء، خرج الرجل من بيته",
    "De trein naar <place> had <number> minuten vertraging, en op het perron",
    "W małym mieście nad rzeką mieszkała kobieta, która",
    "<place> şehrinde bu yıl <number> gün boyunca",
    "हर सुबह गाँव के लोग नदी के किनारे",
)

MATHEMATICS = (
    "Theorem <number>. Let $G$ be a finite group and $H$ a subgroup of $G$. Then",
    "Problem. <name> has <number> apples and gives a third of them to <name>. How many",
    "We compute the integral $\\int_0^1 x^2 e^{x}\\,dx$. Integrating by parts,",
    "Solve for $x$: $2x^2 - <number>x + 5 = 0$. First,",
    "Proof. Suppose, to the contrary, that there are only finitely many primes $p_1, \\dots, p_n$. Consider",
    "Let $X_1, X_2, \\dots$ be independent random variables with mean $\\mu$ and variance $\\sigma^2$. By",
    "Exercise <number>. A train leaves <place> at 9:40 and travels at <number> km/h. Another train",
    "\\begin{align}\n\\nabla \\times \\mathbf{E} &= -\\frac{\\partial \\mathbf{B}}{\\partial t} \\\\\n",
    "Step 1: write <number> as a product of primes.",
)


SYSTEMS = (
    "You are a helpful assistant. Answer briefly and say so when you do not know.",
    "You are an experienced programmer who reviews code and explains each change.",
    "You translate between languages and keep the tone of the text.",
    "You are a patient teacher of mathematics. Show every step.",
    "You may call tools. Tools: "
    '[{"name": "search", "parameters": {"query": "string", "limit": "integer"}}, '
    '{"name": "book_table", "parameters": {"place": "string", "people": "integer", "time": "string"}}]. '
    "Answer with a JSON object that has the keys name and arguments.",
)

# What the user says, one after the other; the model answers each time.
TALKS = (
    ("What is a <thing> good for, and who made the first one?", "Can you say that more simply?"),
    ("Write a short story about <name> and a <thing> in <place>.",),
    ("Write a Python function that returns the <number> largest files below a folder.", "Now add tests for it."),
    ("I have <number> minutes. How do I learn something useful about <field>?",),
    ("Find a restaurant in <place> for <number> people tomorrow evening.", "Make it an hour later."),
    ("Translate into German and French: The <thing> is broken, please send <name> a new one.",),
    ("Make a table of five towns like <place> with their people, area and climate.", "Give the same as JSON."),
    ("What is <number> times <number>? Show how you get there.", "And half of that?"),
    (
        "Summarise: The town of <place> has bought a <thing> for its museum. It cost <number> thousand, "
        "which some call too much. <name>, who leads the museum, says that schools asked for it for years.",
    ),
    ("Why does my query on a table of <number> million rows take so long? It has no index on the column I filter by.",),
    ("Erkläre mir bitte, wie Wald und Wetter zusammenhängen.", "Und auf Englisch?"),
    ("Peux-tu écrire une lettre à <name> pour refuser une invitation à <place> ?",),
    ("¿Qué se puede visitar en <place> en <number> días?",),
    ("请用简单的话解释一下什么是利息。", "能举一个例子吗?"),
    ("Напиши короткое письмо соседу о шуме ночью.",),
    ("Give me <number> names for a shop that sells a <thing> and explain the best one.",),
    ("Is this correct? `for (int i = 0; i <= n; i++) sum += a[i];` where a has n entries.", "How would you write it in Rust?"),
    ("Plan a week for <name>, who works in <place>, learns about <field> and runs <number> km.", "Leave Wednesday free."),
)


SELF = "self"  # what text that a model writes is called among the sources of texts

# What stands in angle brackets in an opening: the same opening twice is not the same text twice.
_FILLS = {
    "<name>": "Anna Tomás Mei Jakub Leila Oskar Ruth Ivan Noor Pedro Greta Kenji Amara Louis Sofia Henrik".split(),
    "<place>": "Lisbon Tromsø Nairobi Leipzig Kyoto Quito Bergamo Cork Tbilisi Halifax Valencia Hue Graz Oaxaca".split(),
    "<thing>": "bridge kettle bicycle orchard lantern engine letter glacier piano market compass harbour loom roof".split(),
    "<field>": "soil tides bees steel sleep bread maps vaccines radio forests trade glass rivers memory".split(),
    "<number>": [str(number) for number in (3, 7, 12, 18, 24, 35, 48, 60, 75, 96, 110, 144, 250, 365, 512, 1200, 4096)],
}
_CHANGING = ("<name>", "<number>")


@dataclass(frozen=True, slots=True)
class Opening:
    """How one text begins.

    Attributes
    ----------
    kind
        What the text is to be like.
    parts
        Of a talk what the system says, or nothing, and then what the user says each time; else the first words alone.
    """

    kind: str
    parts: tuple[str, ...]

    @property
    def is_talk(self) -> bool:
        """Whether the model is to answer, in its own template if it has one."""
        return self.kind == "talk"


# Talk stands twice among the kinds: it is what most models are asked for.
KINDS: tuple[tuple[Opening, ...], ...] = (
    tuple(Opening("talk", ("", *turns)) for turns in TALKS),
    tuple(Opening("prose", (text,)) for text in PROSE),
    tuple(Opening("code", (text,)) for text in CODE),
    tuple(Opening("talk", (SYSTEMS[i % len(SYSTEMS)], *turns)) for i, turns in enumerate(TALKS)),
    tuple(Opening("languages", (text,)) for text in LANGUAGES),
    tuple(Opening("forms", (text,)) for text in FORMS),
    tuple(Opening("mathematics", (text,)) for text in MATHEMATICS),
)


def dealt(seed: int, batch: int) -> Iterator[Opening]:
    """Yield openings without end, one of each kind in turn, filled in and in an order that `seed` and `batch` decide."""
    rng = random.Random(seed * 1_000_003 + batch)
    hands: list[list[Opening]] = [[] for _ in KINDS]
    turn = rng.randrange(len(KINDS))
    while True:
        if not hands[turn]:
            hands[turn] = rng.sample(KINDS[turn], len(KINDS[turn]))
        opening = hands[turn].pop()
        yield Opening(opening.kind, _filled(opening.parts, rng))
        turn = (turn + 1) % len(KINDS)


def openings_sha256() -> str:
    """Return what tells these openings from those of another version."""
    return hashlib.sha256(repr((KINDS, _FILLS)).encode()).hexdigest()


def _filled(parts: tuple[str, ...], rng: random.Random) -> tuple[str, ...]:
    """Return `parts` with words for the marks: a name or a number is another one each time, a thing stays what it is."""
    found = list(parts)
    for mark, choices in _FILLS.items():
        word = rng.choice(choices)
        for i, part in enumerate(found):
            while mark in part:
                part = part.replace(mark, word, 1)
                word = rng.choice(choices) if mark in _CHANGING else word
            found[i] = part
    return tuple(found)
