"""Parts that formats share: texts, tools, tool calls, and the last look at a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from xtuner_core.data.conversation import Conversation, Message, ToolCall
from xtuner_core.data.jsonl import Rejected, parse_text

THINK, END_THINK = "<think>", "</think>"
_CALL_KEYS = {"id", "type", "function", "index"}


def conversation(messages: Iterable[Message], tools: Any = None) -> Conversation:
    """The conversation, if it has something to learn; `tools` as in `tools_of`."""
    made = Conversation(tuple(messages), tools_of(tools) if tools else ())
    for message in made.messages:
        if message.loss:
            return made
    if any(message.role == "assistant" for message in made.messages):
        raise Rejected("nothing to learn: every turn has loss false")
    raise Rejected("no assistant turn")


def text(value: Any, what: str) -> str:
    """A string without NUL; `what` names it in the reason."""
    if not isinstance(value, str):
        raise Rejected(f"{what} must be text, found {type(value).__name__}")
    if "\0" in value:
        raise Rejected(f"{what} holds a NUL character")
    return value


def answer(value: Any, what: str) -> Message:
    """An assistant's turn with loss; thinking in front of it, as Qwen3 and DeepSeek-R1 write it, goes where it belongs."""
    thinking, content = split_thinking(text(value, what))
    if not content:
        raise Rejected(f"{what}: empty answer")
    return Message("assistant", content, True, thinking)


def split_thinking(content: str) -> tuple[str | None, str]:
    """`<think>`, thinking, `</think>` and the answer as (thinking, answer), without line breaks around, as Qwen3's template takes it."""
    if not content.startswith(THINK) or END_THINK not in content:
        return None, content
    thinking, _, rest = content[len(THINK) :].partition(END_THINK)
    return thinking.strip("\n"), rest.lstrip("\n")


def json_of(value: str, what: str) -> Any:
    """The value of JSON inside a text, parsed as strictly as a line."""
    try:
        return parse_text(value)
    except Rejected as reason:
        raise Rejected(f"{what}: {reason}") from None


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tools as OpenAI's objects from a list, or from JSON of one; a bare function is wrapped."""
    tools = json_of(value, "tools") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise Rejected(f"tools must be a list, found {type(tools).__name__}")
    return tuple(_tool(tool, f"tool {index}") for index, tool in enumerate(tools))


def _tool(tool: Any, what: str) -> dict[str, Any]:
    function = _json_object(tool.get("function", tool) if isinstance(tool, dict) else tool, what)
    text(function.get("name"), f"{what}: name")
    return tool if "function" in tool else {"type": "function", "function": tool}


def tool_calls(value: Any, what: str) -> tuple[ToolCall, ...]:
    """Calls as OpenAI writes them, `{"id", "type", "function": {"name", "arguments"}}`, or the function alone."""
    if not isinstance(value, list):
        raise Rejected(f"{what} must be a list, found {type(value).__name__}")
    return tuple(tool_call(entry, f"{what}, call {index}") for index, entry in enumerate(value))


def tool_call(entry: Any, what: str) -> ToolCall:
    """One call; its arguments are an object, or JSON of one."""
    if not isinstance(entry, dict):
        raise Rejected(f"{what}: expected an object, found {type(entry).__name__}")
    function = entry.get("function", entry)
    if not isinstance(function, dict):
        raise Rejected(f"{what}: function must be an object, found {type(function).__name__}")
    known = {"name", "arguments"}
    if unknown := (function.keys() - known - (_CALL_KEYS if function is entry else set())) | (entry.keys() - known - _CALL_KEYS):
        raise Rejected(f"{what}: unknown key {min(unknown)!r}")
    arguments, name = function.get("arguments"), text(function.get("name"), f"{what}: name")
    if isinstance(arguments, str):
        arguments = json_of(arguments, f"{what}: arguments")
    number = entry.get("id")
    return ToolCall(name, _json_object(arguments, f"{what}: arguments"), None if number is None else text(number, f"{what}: id"))


def _json_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Rejected(f"{what} must be an object, found {type(value).__name__}")
    try:
        json.dumps(value, allow_nan=False)  # a table may hold dates, bytes or NaN
    except (TypeError, ValueError) as error:
        raise Rejected(f"{what}: not JSON: {error}") from None
    return value
