"""A template that nobody has seen before: the model's own Jinja renders, and the mask is still exact."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.render import choose_template, own_ids, renderer
from xtuner_core.data.tokenize import Document, encode, load_tokenizer
from xtuner_core.errors import RecipeError

JINJA = """{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages -%}
{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif -%}
{% if m['role'] == 'assistant' -%}
<|im_start|>bot: {{ m['content'] | trim }}<|im_end|>
{% else -%}
<|im_start|>{{ m['role'] | upper }}: {{ m['content'] }}<|im_end|>
{% endif -%}
{% endfor %}{% if add_generation_prompt %}<|im_start|>bot: {% endif %}"""

FORGETFUL = """{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

USER, SYSTEM = Message("user", "How warm is it?"), Message("system", " Be brief. ")


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(JINJA)
    return folder


def answer(text: str, loss: bool = True) -> Message:
    return Message("assistant", text, loss)


def encoded(model: Path, conversation: Conversation) -> Document:
    tokenizer = load_tokenizer(model)
    return encode(tokenizer, [list(renderer("own", model, tokenizer)(conversation))])[0]


def learned(model: Path, document: Document) -> str:
    from tokenizers import Tokenizer

    whole = Tokenizer.from_file(str(model / "tokenizer.json"))
    return whole.decode(document.ids[document.loss].tolist(), skip_special_tokens=False)


CONVERSATIONS = [
    (Conversation((USER, answer("20 °C"))), "20 °C<|im_end|>"),
    (Conversation((SYSTEM, USER, answer("\n\n  Twenty.\n"))), "Twenty.<|im_end|>"),
    (Conversation((USER, answer("a"), USER, answer("b", loss=False), USER, answer("你好 👋"))), "a<|im_end|>你好 👋<|im_end|>"),
    (Conversation((USER, answer("c")), tools=({"name": "f", "description": "ü"},)), "c<|im_end|>"),
]


@pytest.mark.parametrize(("conversation", "words"), CONVERSATIONS)
def test_ids_are_the_template_s_and_the_answer_with_its_stop_token_is_learned(model: Path, conversation: Conversation, words: str) -> None:
    document = encoded(model, conversation)
    assert np.array_equal(document.ids, own_ids(model, [conversation])[0])
    assert learned(model, document) == words


def test_it_is_chosen_when_no_shipped_template_fits(model: Path) -> None:
    assert choose_template(model, None) == "own"


def test_content_forges_no_turn(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    harmless = encoded(model, Conversation((USER, answer("x")), tools=({"name": "f"},)))
    control = list(tokenizer.control.values())
    for token in tokenizer.control:
        text = f"a{token}b{token}{token}"
        bad = Conversation((Message("user", text), answer(text)), tools=({"name": text, text: [text]},))
        document = encoded(model, bad)
        assert [i for i in document.ids.tolist() if i in control] == [i for i in harmless.ids.tolist() if i in control]
        assert learned(model, document) == f"{text}<|im_end|>"


def test_what_the_template_refuses_is_rejected(model: Path) -> None:
    with pytest.raises(Rejected, match="refuses the conversation: no tools here"):
        encoded(model, Conversation((USER, Message("tool", "3"), answer("x"))))


def test_a_turn_that_is_rewritten_later_is_not_guessed(model: Path) -> None:
    (model / "chat_template.jinja").write_text(FORGETFUL)
    with pytest.raises(Rejected, match=r"message 1: .*writes this turn differently"):
        encoded(model, Conversation((USER, answer("a"), USER, answer("b"))))
    last = Conversation((USER, answer("a", loss=False), USER, answer("b")))
    assert learned(model, encoded(model, last)) == "b<|im_end|>"


def test_a_conversation_with_private_use_characters_keeps_them(model: Path) -> None:
    document = encoded(model, Conversation((USER, answer("\ue000 <|im_end|> \ue001"))))
    assert learned(model, document) == "\ue000 <|im_end|> \ue001<|im_end|>"


def test_own_needs_a_template_of_its_own(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match="no chat template"):
        choose_template(model, "own")
