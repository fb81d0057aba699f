"""Conversations to compare chat templates on: generated from a seed, and those of the project's own data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from xtuner_core.data.conversation import Conversation, Message, ToolCall

PROJECT = Path(__file__).parents[2]
FRAGMENTS = (
    "Hello", "12 + 345 = 357", "12345678901234567890", "3.14159", "don't", "We'll see: it's 5%!", "naïve café",
    "e\u0301a\u0308", "你好，世界。", "こんにちは", "안녕하세요", "مرحبا بالعالم", "שלום", "नमस्ते", "👩‍👩‍👧‍👦", "🏳️‍🌈 ok", "𝔘𝔫𝔦",
    "\u202eabc\u202c", "a\u200bb", "\u00a0x", "def f(x):\n    return x[::-1]  # ok\n",
    "\tif (a && b) {\r\n\t\treturn;\r\n\t}", "SELECT * FROM t WHERE a <> 'b';", "<b>bold</b>", "{{ user }}",
    "{% if x %}", "| a | b |\n|---|---|\n", "\n", "\n\n\n", "  ", "   indented", "\t\t", "- one\n- two\n",
    "https://example.org/?q=a%20b#c", "ﬁ ½ Å", "A" * 40, "a\\nb \"quoted\" 'text'", "user\n", "assistant", "[INST",
    "<|im", "▁ ▁▁", "\u2028x", "…—–", "x^2_i \\frac{1}{2}",
)  # fmt: skip
NAMES = ("get_weather", "search", "compute", "tägliche_suche", "a.b-c")
PROPERTIES: tuple[dict[str, Any], ...] = (
    {"type": "string", "description": "A city's name — e.g. Zürich"},
    {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
    {"type": "integer", "default": 3},
    {"type": "number", "description": "How many"},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "array", "items": {"type": "integer"}, "nullable": True},
    {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
    {"type": "array"},
    {"type": "object", "properties": {"lat": {"type": "number"}, "名": {"type": "string"}}, "required": ["lat"]},
    {"type": "object", "properties": {"in": {"type": "object", "properties": {"deep": {"type": "boolean"}}}}},
    {"type": "object"},
    {"oneOf": [{"type": "string", "description": "one"}, {"type": "number", "default": 2}], "default": "x"},
    {"oneOf": [{"type": "object"}, {"type": "string"}]},
    {"type": ["string", "null"]},
    {"type": "string", "nullable": True},
    {"type": "array", "items": {"type": "array", "items": {"type": "string", "enum": ["a long word", "and another long word", "third"]}}},
    {},
)
VALUES: tuple[Any, ...] = ("Zürich", 3, 2.5, True, None, ["a", "ü"], {"k": "v\n\"q\"", "n": {"m": []}}, "", "你好", "a\\b")  # fmt: skip


def generated(count: int, parts: frozenset[str], seed: int = 0) -> Iterator[Conversation]:
    """Random conversations, each with a learned answer; `parts` says which of system, tools and thinking may occur."""
    random = Random(seed)
    for _ in range(count):
        yield _conversation(random, parts)


def of_the_project() -> list[Conversation]:
    """The project's data sets (every 20th ticket), and the shared one where it is."""
    files = [
        PROJECT / "data/openai_chats/train.jsonl",
        PROJECT / "data/openai_chats/heldout.jsonl",
        PROJECT.parent / "shared/data/openai_sft.jsonl",
    ]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]
    tickets = (PROJECT / "data/tickets/train.jsonl").read_text(encoding="utf-8").splitlines()
    return [_parsed(row) for row in [*rows, *map(json.loads, tickets[::20])]]


def _parsed(row: Any) -> Conversation:
    entries = row["messages"] if isinstance(row, dict) else row
    return Conversation(tuple(Message(entry["role"], entry["content"], entry["role"] == "assistant") for entry in entries))


def text(random: Random) -> str:
    """A few fragments, with blanks and line breaks where one does not expect them; often an ordinary sentence, at times empty."""
    if random.random() < 0.1:
        return ""
    return "".join(random.choice(FRAGMENTS) + random.choice((" ", "", "\n", ". ", "  ")) for _ in range(random.randint(1, 5)))


def _conversation(random: Random, parts: frozenset[str]) -> Conversation:
    tools = (
        tuple(_tool(random, name) for name in random.sample(NAMES, random.randint(1, 3)))
        if "tools" in parts and random.random() < 0.4
        else ()
    )
    messages = [Message("system", text(random))] if "system" in parts and random.random() < 0.5 else []
    for turn in range(random.randint(1, 4)):
        messages.append(Message("user", text(random)))
        if tools and random.random() < 0.6:
            messages += _use(random, parts)
        messages.append(_answer(random, parts, loss=turn == 0 or random.random() < 0.7))
    return Conversation(tuple(messages), tools)


def _answer(random: Random, parts: frozenset[str], loss: bool) -> Message:
    return Message("assistant", text(random), loss, _thinking(random, parts))


def _thinking(random: Random, parts: frozenset[str]) -> str | None:
    return text(random) if "thinking" in parts and random.random() < 0.5 else None


def _use(random: Random, parts: frozenset[str]) -> list[Message]:
    """A turn with calls, and their results."""
    count = random.randint(1, 3) if "several calls" in parts else 1
    calls = tuple(ToolCall(random.choice(NAMES), _arguments(random), _id(random)) for _ in range(count))
    content = text(random) if "words beside calls" in parts and random.random() < 0.5 else ""
    thinking = None if content else _thinking(random, parts)
    results = [Message("tool", text(random), name=call.name, tool_call_id=call.id) for call in calls]
    return [Message("assistant", content, random.random() < 0.8, thinking, calls), *results]


def _arguments(random: Random) -> dict[str, Any]:
    return {key: random.choice(VALUES) for key in random.sample(("city", "unit", "größe", "n"), random.randint(0, 3))}


def _id(random: Random) -> str:
    return "".join(random.choice("abcdefgh0123456789") for _ in range(9))


def _tool(random: Random, name: str) -> dict[str, Any]:
    names = random.sample(("city", "unit", "größe", "n", "filter"), random.randint(0, 5))
    properties = {key: random.choice(PROPERTIES) for key in names}
    parameters = {"type": "object", "properties": properties, "required": names[:1]}
    return {
        "type": "function",
        "function": {"name": name, "description": random.choice(("Looks it up — “now”.", "Calls <it>", "x")), "parameters": parameters},
    }
