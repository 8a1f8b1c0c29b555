"""The pass key task: one number hidden in text, asked for at the end."""

PASSKEY_DIGITS = 5


def passkey_texts(key: str) -> tuple[str, str, str]:
    """Return the needle, the question and the expected answer for `key` (after Mohtashami and Jaggi 2023)."""
    needle = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    return needle, "\nWhat is the pass key? The pass key is", f" {key}"
