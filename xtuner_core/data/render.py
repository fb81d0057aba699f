"""Which chat template a model speaks, proved by comparing token ids with the model's own template."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from xtuner_core import registry
from xtuner_core.data import templates
from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.own_template import own_renderer, own_tokenizer
from xtuner_core.data.pieces import Control, Piece
from xtuner_core.data.tokenize import ChatTokenizer, encode, load_tokenizer
from xtuner_core.errors import RecipeError


class Template(Protocol):
    """What a module of the templates folder offers."""

    JINJA: str | None
    """The same template for everything that serves the model; None if only models that bring their own can have it."""
    STOP: str
    """The token that ends the assistant's turn."""

    def render(self, conversation: Conversation) -> Iterable[Piece]: ...


PROBES = (
    Conversation((Message("user", "Hello, who are you?"), Message("assistant", "A model.", loss=True))),
    Conversation((Message("system", "Be brief."), Message("user", " 12 + 345\n"), Message("assistant", "\n357", loss=True))),
    Conversation(
        (Message("user", "é 你好"), Message("assistant", "k", loss=True), Message("user", "?"), Message("assistant", "y", loss=True))
    ),
)


def find_template(name: str) -> Template:
    """The template module called `name` (RecipeError with the known names otherwise)."""
    return cast(Template, registry.find(templates, name))


def renderer(name: str, model_dir: Path, tokenizer: ChatTokenizer) -> Callable[[Conversation], Iterable[Piece]]:
    """The function that renders conversations: a shipped template's, or with the name `own` the model's Jinja template."""
    if name == templates.OWN:
        return own_renderer(model_dir, tokenizer.control)
    return find_template(name).render


def choose_template(model_dir: Path, name: str | None) -> str:
    """The name of the template to train with: the one asked for, or the one that gives the same ids as the model's own.

    `own`, if no shipped one does: then the model's Jinja template itself renders, some fifty times slower.

    Raises:
        RecipeError: the asked-for template differs from the model's own, or none fits.
    """
    asked = find_template(name) if name and name != templates.OWN else None
    own = has_own_template(model_dir)
    candidates = [name] if name else [*registry.names(templates), templates.OWN]
    if not own:
        if name and asked and asked.JINJA is not None:
            return name
        fitting = [word for word in registry.names(templates) if find_template(word).JINJA is not None]
        raise RecipeError(f"{model_dir}: the model has no chat template; set model.template to one of {', '.join(fitting)}.")
    tokenizer = load_tokenizer(model_dir)
    theirs = _own_probes(model_dir)
    reasons = {}
    for candidate in candidates:
        reasons[candidate] = _first_mismatch(candidate, tokenizer, model_dir, theirs)
        if reasons[candidate] is None:
            return candidate
    told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise RecipeError(f"{model_dir}: no template gives the token ids of the model's own ({told}). Set model.template, or add a template.")


def difference_from_own(model_dir: Path, name: str) -> str | None:
    """Where the token ids of template `name` first differ from those of the model's own template, in words; None if nowhere."""
    if not has_own_template(model_dir):
        return "the model has none"
    return _first_mismatch(name, load_tokenizer(model_dir), model_dir, _own_probes(model_dir))


def stop_token(name: str, model_dir: Path, tokenizer: ChatTokenizer) -> str | None:
    """The token that ends the assistant's turn; of the template `own` the last one that is learned of an answer, if any is."""
    if name != templates.OWN:
        return find_template(name).STOP
    learned = [piece.token for piece in renderer(name, model_dir, tokenizer)(PROBES[0]) if isinstance(piece, Control) and piece.loss]
    return learned[-1] if learned else None


def control_tokens(name: str) -> tuple[str, ...]:
    """The control tokens that a shipped template writes in plain conversations, in the order in which they come."""
    found: dict[str, None] = {}
    for probe in PROBES:
        with suppress(Rejected):  # of a system prompt, say
            found |= dict.fromkeys(piece.token for piece in find_template(name).render(probe) if isinstance(piece, Control))
    return tuple(found)


def has_own_template(model_dir: Path) -> bool:
    """Whether the folder brings a chat template."""
    return own_tokenizer(model_dir).chat_template is not None


def own_ids(model_dir: Path, conversations: Sequence[Conversation]) -> list[np.ndarray]:
    """Token ids of the folder's own chat template."""
    tokenizer = own_tokenizer(model_dir)
    return [_own(tokenizer, one) for one in conversations]


def _own(tokenizer: Any, one: Conversation) -> np.ndarray:
    ids = tokenizer.apply_chat_template(one.as_dicts(), tools=list(one.tools) or None, tokenize=True, return_dict=False)
    return np.array(ids, dtype=np.uint32)


def _own_probes(model_dir: Path) -> list[np.ndarray | None]:
    """Ids of each probe; None for one that the model's own template refuses, as some refuse a system prompt."""
    tokenizer = own_tokenizer(model_dir)
    found: list[np.ndarray | None] = []
    for probe in PROBES:
        try:
            found.append(_own(tokenizer, probe))
        except Exception as error:  # a chat template is the model author's program: it may raise anything
            if not found:
                raise RecipeError(f"{model_dir}: the model's own chat template fails: {error}. Set model.template.") from None
            found.append(None)
    return found


def first_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], ends: Container[int] = ()) -> str | None:
    """Where two lists of token ids first differ, in words; None if they are equal.

    Ours may have one of `ends` more: some templates (GLM's) leave the token that ends the last turn to the turn that follows.
    """
    for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        if len(left) == len(right) + 1 and int(left[-1]) in ends:
            left = left[:-1]
        if not np.array_equal(left, right):
            shared = min(len(left), len(right))
            position = next((at for at in range(shared) if left[at] != right[at]), shared)
            return f"conversation {index} differs at token {position} ({len(left)} and {len(right)} tokens)"
    return None


def _first_mismatch(name: str, tokenizer: ChatTokenizer, model_dir: Path, theirs: Sequence[np.ndarray | None]) -> str | None:
    ours = []
    try:
        render = renderer(name, model_dir, tokenizer)
        for probe in PROBES:
            try:
                ours.append(encode(tokenizer, [list(render(probe))])[0].ids)
            except Rejected as refusal:  # of a system prompt, say; but what every template must take is the first
                if not ours:
                    return str(refusal)
                ours.append(None)
    except RecipeError as error:
        return str(error)
    both = [(left, right) for left, right in zip(ours, theirs, strict=True) if left is not None and right is not None]
    return first_difference([left for left, _ in both], [right for _, right in both], set(tokenizer.control.values()))
