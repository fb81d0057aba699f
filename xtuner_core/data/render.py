"""Which chat template a model speaks, proved by comparing token ids with the model's own template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from xtuner_core import registry
from xtuner_core.data import templates
from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.own_template import own_renderer
from xtuner_core.data.pieces import Piece
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
        if asked and asked.JINJA is not None:
            return name
        fitting = [word for word in registry.names(templates) if find_template(word).JINJA is not None]
        raise RecipeError(f"{model_dir}: the model has no chat template; set model.template to one of {', '.join(fitting)}.")
    tokenizer = load_tokenizer(model_dir)
    reasons = {candidate: _first_mismatch(candidate, tokenizer, model_dir) for candidate in candidates}
    for candidate, reason in reasons.items():
        if reason is None:
            return candidate
    told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise RecipeError(f"{model_dir}: no template gives the token ids of the model's own ({told}). Set model.template, or add a template.")


def has_own_template(model_dir: Path) -> bool:
    """Whether the folder brings a chat template."""
    return own_tokenizer(model_dir).chat_template is not None


def own_tokenizer(model_dir: Path):  # noqa: ANN201 - a transformers class, imported only when needed
    """The folder's tokenizer as transformers loads it: the reference that servers and evaluators use."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def own_ids(model_dir: Path, conversations: Sequence[Conversation]) -> list[np.ndarray]:
    """Token ids of the folder's own chat template."""
    tokenizer = own_tokenizer(model_dir)
    encoded = (_own(tokenizer, one) for one in conversations)
    return [np.array(ids, dtype=np.uint32) for ids in encoded]


def _own(tokenizer: Any, one: Conversation) -> list[int]:
    return tokenizer.apply_chat_template(one.as_dicts(), tools=list(one.tools) or None, tokenize=True, return_dict=False)


def first_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> str | None:
    """Where two lists of token ids first differ, in words; None if they are equal."""
    for index, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        if not np.array_equal(left, right):
            shared = min(len(left), len(right))
            position = next((at for at in range(shared) if left[at] != right[at]), shared)
            return f"conversation {index} differs at token {position} ({len(left)} and {len(right)} tokens)"
    return None


def _first_mismatch(name: str, tokenizer: ChatTokenizer, model_dir: Path) -> str | None:
    try:
        render = renderer(name, model_dir, tokenizer)
        documents = encode(tokenizer, [list(render(probe)) for probe in PROBES])
    except (RecipeError, Rejected) as error:
        return str(error)
    try:
        return first_difference([document.ids for document in documents], own_ids(model_dir, PROBES))
    except Exception as error:  # a chat template is the model author's program: it may raise anything
        return f"the model's own template fails: {error}"
