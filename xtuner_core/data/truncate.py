"""What happens to a document that is longer than `max_length`: the recipe's word, never a silent loss of all that is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xtuner_core.data.conversation import Conversation
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.tokenize import Document


class Dropped(Exception):
    """The recipe says to leave such a document out; it is counted."""


def fit(conversation: Conversation, document: Document, policy: str, limit: int, encode: Callable[[Conversation], Document]) -> Document:
    """The document if it has at most `limit` tokens, else what `policy` (`data.too_long`) makes of it.

    Raises:
        Rejected: too long under policy reject, or nothing to learn is left.
        Dropped: too long under policy drop.
    """
    length = len(document.ids)
    if length > limit:
        match policy:
            case "reject":
                raise Rejected(f"{length} tokens, data.max_length is {limit}; data.too_long says what to do with such a line")
            case "drop":
                raise Dropped
            case "cut_tokens":
                document = Document(document.ids[:limit], document.loss[:limit])
            case "cut_turns":
                document = _whole_turns(conversation, limit, encode) or Document(document.ids[:0], document.loss[:0])
            case _:
                raise ValueError(policy)
    if not document.loss[1:].any():  # nothing predicts the first token
        cut = f" of the first {limit} of its {length} tokens (data.max_length)" if length > limit else ""
        raise Rejected(f"nothing to learn{cut}")
    return document


def _whole_turns(conversation: Conversation, limit: int, encode: Callable[[Conversation], Document]) -> Document | None:
    """The longest beginning that ends with an assistant's turn and fits, found by bisection: more turns are more tokens."""
    messages = conversation.messages
    ends = [index + 1 for index, message in enumerate(messages[:-1]) if message.role == "assistant"]
    best, low, high = None, 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        document = encode(Conversation(messages[: ends[middle]], conversation.tools))
        if len(document.ids) <= limit:
            best, low = document, middle + 1
        else:
            high = middle
    return best


def chunks(document: Document, limit: int) -> Iterator[Document]:
    """A text's tokens in pieces of at most `limit`; each begins with the last token of the one before, so that every token but the
    first of all is learned exactly once."""
    for start in range(0, len(document.ids) - 1, limit - 1):
        piece = Document(document.ids[start : start + limit], document.loss[start : start + limit].copy())
        piece.loss[0] = False
        yield piece
