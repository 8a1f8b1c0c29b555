"""First words of programs in several languages, and of data in several forms. Data only; marks are those of `openings`."""

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
