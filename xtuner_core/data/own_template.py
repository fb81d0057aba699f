"""A model's own Jinja chat template, for models that no shipped template fits: slower, as exact, and as safe against forged turns.

The template runs in transformers' sandbox. What the model learns to write is found by rendering the conversation up to each turn
(prefix rendering): the turn is what the rendering gains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.pieces import Control, Piece, Text
from xtuner_core.data.templates._parts import TODAY
from xtuner_core.errors import RecipeError

_MARKS = [chr(code) for code in range(0xE000, 0xE100)]
"""Private-use characters; one that the conversation does not hold breaks up what looks like a control token in it."""
_NOW = re.compile(r"""strftime_now\((["'])(.*?)\1\)""")


def own_tokenizer(model_dir: Path):  # noqa: ANN201 - a transformers class, imported only when needed
    """The folder's tokenizer as transformers loads it: the reference that servers and evaluators use.

    A template that asks for today's date gets always the same one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except ValueError:  # its class is code in the folder, which nobody runs; tokenizer.json says all that is needed
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir, local_files_only=True)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = _NOW.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.chat_template)
    return tokenizer


def own_renderer(model_dir: Path, control: dict[str, int]) -> Callable[[Conversation], list[Piece]]:
    """The function that renders a conversation with the folder's own chat template. It raises Rejected for one the template refuses."""
    tokenizer = own_tokenizer(model_dir)
    if tokenizer.chat_template is None:
        raise RecipeError(f"{model_dir}: the model has no chat template of its own; set model.template.")
    tokens = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True) if len(token) > 1) or r"(?!)")

    def text_of(messages: list[dict[str, Any]], tools: list[Any], answer_next: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=answer_next))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Rejected(f"the model's own chat template refuses the conversation: {error}") from None

    def render(conversation: Conversation) -> list[Piece]:
        mark = _unused_mark(repr(conversation))
        messages = _shielded(conversation.as_dicts(), tokens, mark)
        tools = _shielded(list(conversation.tools), tokens, mark)
        whole = text_of(messages, tools, False)
        spans = [
            _span(index, text_of(messages[:index], tools, True), text_of(messages[: index + 1], tools, False), whole, tokens)
            for index, message in enumerate(conversation.messages)
            if message.loss
        ]
        return list(_pieces(whole, spans, tokens, mark))

    return render


def _unused_mark(text: str) -> str:
    for mark in _MARKS:
        if mark not in text and f"\\u{ord(mark):04x}" not in text:
            return mark
    raise Rejected("holds every private-use character from U+E000 to U+E0FF")


def _shielded(value: Any, tokens: re.Pattern[str], mark: str) -> Any:
    """The value with a mark behind the first character of every control token's name in its texts."""
    if isinstance(value, str):
        while found := tokens.search(value):
            value = value[: found.start() + 1] + mark + value[found.start() + 1 :]
        return value
    if isinstance(value, list):
        return [_shielded(item, tokens, mark) for item in value]
    if isinstance(value, dict):
        return {_shielded(key, tokens, mark): _shielded(item, tokens, mark) for key, item in value.items()}
    return value


def _span(index: int, before: str, upto: str, whole: str, tokens: re.Pattern[str]) -> tuple[int, int]:
    """The characters of `whole` that turn `index` adds, to the control token that ends it."""
    stops = [found.end() for found in tokens.finditer(upto, len(before))]
    end = stops[-1] if stops else len(upto)
    if not (upto.startswith(before) and whole[:end] == upto[:end]):
        raise Rejected(
            f"message {index}: the model's own chat template writes this turn differently when others follow, so what is learned of it "
            "cannot be told; set data.loss to last, or mark the turn with loss false"
        )
    return len(before), end


def _pieces(text: str, spans: list[tuple[int, int]], tokens: re.Pattern[str], mark: str) -> Iterator[Piece]:
    """The rendered text cut at control tokens and at the ends of what is learned; marks are taken out again."""
    place = 0
    for found in tokens.finditer(text):
        yield from _texts(text, place, found.start(), spans, mark)
        yield Control(found[0], any(start <= found.start() < end for start, end in spans))
        place = found.end()
    yield from _texts(text, place, len(text), spans, mark)


def _texts(text: str, start: int, end: int, spans: list[tuple[int, int]], mark: str) -> Iterator[Text]:
    cuts = sorted({start, end, *(cut for span in spans for cut in span if start < cut < end)})
    for left, right in pairwise(cuts):
        yield Text(text[left:right].replace(mark, ""), any(first <= left < last for first, last in spans))
