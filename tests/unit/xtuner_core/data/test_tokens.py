"""Rendered conversations as token ids: equal to the model's own chat template, loss on the answers only, no forged control token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.pieces import Text
from xtuner_core.data.render import choose_template, find_template, own_tokenizer
from xtuner_core.data.tokenize import ChatTokenizer, Document, encode, load_tokenizer
from xtuner_core.errors import RecipeError

FOLDERS = ["tiny_model_folder", "smollm2_folder"]
MANY = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


@dataclass(frozen=True, repr=False)
class Speech:
    """A model's tokenizer, ours and its own, and the template it speaks."""

    ours: ChatTokenizer
    own: Any
    whole: Tokenizer
    template: str

    def encode(self, *messages: Message) -> Document:
        return encode(self.ours, [list(find_template(self.template).render(Conversation(messages)))])[0]

    def round_trip(self, text: str) -> str:
        """The text as far as the vocabulary has it: SmolLM2's lacks some bytes of rare scripts and drops them."""
        return self.whole.decode(self.ours.plain.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module", params=FOLDERS)
def speech(request: pytest.FixtureRequest) -> Speech:
    folder: Path = request.getfixturevalue(request.param)
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Speech(load_tokenizer(folder), own_tokenizer(folder), whole, choose_template(folder, None))


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
snippets = st.sampled_from(["\n", "\n\n", "  ", "\t", "42 + 7", "it's", "É", "你好", "👩‍🚀", "e\u0301", "\u200b", "<|im_", "end|>", "\r\n"])
contents = st.lists(st.text(letters, max_size=12) | snippets, max_size=6).map("".join)
answers = contents.filter(bool)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """System or none, one to three turns; some answers without loss."""
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("user", draw(contents)), Message("assistant", draw(answers), loss=draw(st.booleans()))]
    return tuple(messages)


def test_the_template_is_inferred(speech: Speech) -> None:
    assert speech.template == ("smollm2" if speech.ours.vocab_size > 1000 else "chatml")


@given(messages=conversations())
@MANY
def test_ids_equal_the_models_own_chat_template(speech: Speech, messages: tuple[Message, ...]) -> None:
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    if any(token in json.dumps(dicts, ensure_ascii=False) for token in speech.ours.control):
        return  # content that writes a control token is the one case that must differ
    own = speech.own.apply_chat_template(dicts, tokenize=True, return_dict=False)
    assert speech.encode(*messages).ids.tolist() == own


@given(messages=conversations())
@MANY
def test_loss_covers_the_learned_answers_and_their_end_tokens_only(speech: Speech, messages: tuple[Message, ...]) -> None:
    document = speech.encode(*messages)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], document.loss.astype(np.int8), [0]]))).reshape(-1, 2)
    spans = [speech.whole.decode(document.ids[start:end].tolist(), skip_special_tokens=False) for start, end in edges]
    learned = [speech.round_trip(message.content) + "<|im_end|>" for message in messages if message.loss]
    assert len(spans) == len(learned)
    for span, answer in zip(spans, learned, strict=True):
        # An answer that begins with white space may share its first token with the line break before it.
        assert span == answer or (span == "\n" + answer and answer[0].isspace())


def test_content_cannot_forge_a_control_token(speech: Speech) -> None:
    forged = " ".join(speech.ours.control) + "".join(speech.ours.control)
    messages = [Message("system", forged), Message("user", forged), Message("assistant", forged, loss=True)]
    controls = set(speech.ours.control.values())
    count = [int(np.isin(speech.encode(*said).ids, list(controls)).sum()) for said in (messages, [Message(m.role, "x") for m in messages])]
    assert count == [6, 6]  # begin and end of three turns, whatever the content
    assert forged in speech.whole.decode(speech.encode(*messages).ids.tolist(), skip_special_tokens=False)


def test_the_ids_fit_the_vocabulary(speech: Speech) -> None:
    ids = speech.encode(Message("user", "".join(map(chr, range(1, 0x300)))), Message("assistant", "ok", loss=True)).ids
    assert ids.dtype == np.uint32 and ids.max() < speech.ours.vocab_size


def test_a_vocabulary_that_holds_control_tokens_as_words_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<|im_end|>", 0.0), *((chr(code), -5.0) for code in range(32, 127))], unk_id=0))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert len(encode(ours, [[Text("plain words")]])[0].ids) == len("plain words")
    with pytest.raises(RecipeError, match="forge a turn"):
        encode(ours, [[Text("an <|im_end|> in the text")]])


@pytest.mark.parametrize("content", [None, "{", "{}", '{"added_tokens": []}'])
def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RecipeError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_templates_that_do_not_fit_are_refused_with_the_place(tiny_model_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"no template gives the token ids .*smollm2: conversation 0 differs at token 1"):
        choose_template(tiny_model_folder, "smollm2")
    with pytest.raises(RecipeError, match=r"^'vicuna' is not one of the templates: chatml, "):
        choose_template(tiny_model_folder, "vicuna")
