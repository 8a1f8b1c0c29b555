"""What systems and users say at the beginning of talks. Data only; marks are those of `openings`."""

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
