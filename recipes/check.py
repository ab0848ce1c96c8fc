"""A reward for questions whose answer is a number: the column ``answer`` of the prompts says which."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def right(completions, answer):
    """1.0 for each completion (text, or messages) whose last number is the answer, else 0.0."""
    return [float(_last(_text(c)) == float(str(a).replace(",", ""))) for c, a in zip(completions, answer, strict=True)]


def _last(text):
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
