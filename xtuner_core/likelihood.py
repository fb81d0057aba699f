"""How likely a model finds given texts: `python -m xtuner_core.likelihood REQUEST.json`, in a process of its own.

The request is a JSON object with `model_dir`, `rows` (a JSONL file), `result` (the JSONL file to write) and `outcome` (where a failure is
told). A row has a `place` for messages to people, and one of

    "messages"               a conversation: what is learned of it in training is measured, by the chat template of the model
    "text"                   plain text: every token but the first is measured
    "messages" + "choices"   a question, and answers to it: of each the answer is measured, without the token that ends the turn
    "text" + "choices"       a text, and ways to go on after a space: of each the continuation is measured

The result has a line for each row: `{"nats": [...], "tokens": [...], "hits": [...]}`, per choice (one without choices) the negative
log-likelihood, the number of tokens it is of, and how many of these were the likeliest token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from xtuner_core.data.conversation import Conversation, Message
from xtuner_core.data.dataset import Piece as Part
from xtuner_core.data.dataset import loss_spans
from xtuner_core.data.formats import openai
from xtuner_core.data.jsonl import Rejected
from xtuner_core.data.loader import lay
from xtuner_core.data.own_template import own_tokenizer
from xtuner_core.data.pieces import Piece
from xtuner_core.data.render import choose_template, renderer
from xtuner_core.data.tokenize import ChatTokenizer, Document, encode, load_tokenizer
from xtuner_core.durable import write_bytes, write_json
from xtuner_core.errors import DataError, RecipeError, UserError
from xtuner_core.loss import require_packable, token_losses
from xtuner_core.models import attention

CHUNK = 1024
"""Tokens whose logits exist at one time."""
TOGETHER, SHORT = 1024, 256
"""Tokens of rows that go through the model together; a row of more than `SHORT` goes alone."""


@dataclass(frozen=True)
class Reader:
    """Turns rows into token ids as the model in the folder reads them."""

    model_dir: Path

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """Its control tokens apart from its plain text."""
        return load_tokenizer(self.model_dir)

    @cached_property
    def render(self) -> Callable[[Conversation], Iterable[Piece]]:
        """The chat template that equals the model's own."""
        return renderer(choose_template(self.model_dir, None), self.model_dir, self.tokenizer)

    @cached_property
    def start(self) -> list[int]:
        """The ids that the model's tokenizer puts before plain text: its BOS token, if it has one."""
        tokenizer = own_tokenizer(self.model_dir)
        return [number for number in tokenizer("")["input_ids"][:1] if number == tokenizer.bos_token_id]

    def documents(self, row: Mapping[str, Any]) -> list[Document]:
        """What is measured of a row: one document, or one for each choice.

        Raises:
            Rejected: it is no conversation, or the chat template refuses it.
            RecipeError: the model has no chat template.
        """
        if "messages" in row and "choices" in row:
            asked = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
            return [self._answer(asked, choice) for choice in row["choices"]]
        if "messages" in row:
            return [self._rendered(openai.parse(row))]
        if "choices" in row:
            return [self._continued(row["text"].rstrip(), f" {choice}") for choice in row["choices"]]
        return [self._continued("", row["text"])]

    def _rendered(self, conversation: Conversation) -> Document:
        return encode(self.tokenizer, [list(self.render(conversation))])[0]

    def _answer(self, asked: tuple[Message, ...], choice: str) -> Document:
        whole = self._rendered(Conversation((*asked, Message("assistant", choice, loss=True))))
        return Document(whole.ids, whole.loss & ~self.tokenizer.is_special[whole.ids])

    def _continued(self, context: str, text: str) -> Document:
        """The boundary as lm-evaluation-harness draws it (`_encode_pair`): the text is encoded whole."""
        before = len(self.start) + len(self._plain(context))
        ids = np.array([*self.start, *self._plain(context + text)], np.uint32)
        return Document(ids, np.arange(len(ids)) >= max(before, 1))

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.plain.encode(text, add_special_tokens=False).ids


def load(model_dir: Path) -> PreTrainedModel:
    """The folder's model in the precision of its weights, on the GPU if there is one, in evaluation mode.

    Raises:
        RecipeError: transformers cannot load it, or it cannot run on packed documents.
    """
    try:
        options: dict[str, Any] = {"dtype": "auto", "attn_implementation": attention.register(), "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{model_dir}: transformers cannot load this model: {error}") from None
    model.eval().to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # pyright: ignore[reportArgumentType]
    require_packable(model)
    return model


def measure(model: PreTrainedModel, rows: Sequence[Sequence[Document]]) -> list[dict[str, list[Any]]]:
    """The results of rows whose documents go through the model together; what all of these begin with is computed once."""
    documents = [one for row in rows for one in row]
    spans = [loss_spans(one.loss, np.array([len(one.ids)]))[0].tolist() for one in documents]
    batch = lay([Part(index, one.ids, spans[index]) for index, one in enumerate(documents)]).to(model.device)
    assert batch.places is not None
    losses, hits = token_losses(model, batch, CHUNK)
    owner, count = torch.bucketize(batch.places.cpu(), batch.boundaries[1:], right=True), len(documents)
    nats = torch.zeros(count, dtype=torch.float64).index_add_(0, owner, losses.double().cpu())
    right = torch.zeros(count, dtype=torch.int64).index_add_(0, owner, hits.long().cpu())
    found = zip(nats.tolist(), torch.bincount(owner, minlength=count).tolist(), right.tolist(), strict=True)
    return [_result(islice(found, len(row))) for row in rows]


def _result(found: Iterable[tuple[float, int, int]]) -> dict[str, list[Any]]:
    nats, tokens, hits = zip(*found, strict=True)
    return {"nats": list(nats), "tokens": list(tokens), "hits": list(hits)}


def together(rows: Sequence[Sequence[Document]]) -> Iterator[list[Sequence[Document]]]:
    """Neighbours that are short (100 tokens and 1000 cost a CPU nearly as much); one that is not goes alone, for its choices share much."""
    waiting: list[Sequence[Document]] = []
    for row in rows:
        alone = _tokens(row) > SHORT
        if waiting and (alone or _tokens(row) + sum(map(_tokens, waiting)) > TOGETHER):
            yield waiting
            waiting = []
        if alone:
            yield [row]
        else:
            waiting.append(row)
    if waiting:
        yield waiting


def _tokens(row: Sequence[Document]) -> int:
    return sum(len(one.ids) for one in row)


def run(request: Mapping[str, str]) -> None:
    """Measure every row of the request.

    Raises:
        RecipeError: the model cannot be loaded, or has no chat template.
        DataError: a row cannot be rendered, has nothing to measure, is longer than the model's context, or the weights are not finite.
    """
    model_dir = Path(request["model_dir"])
    lines = Path(request["rows"]).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    reader, model = Reader(model_dir), load(model_dir)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    documents = [_documents(reader, row, limit) for row in rows]
    results = [result for batch in together(documents) for result in measure(model, batch)]
    if not np.isfinite([value for result in results for value in result["nats"]]).all():
        raise DataError(f"{model_dir}: the model's likelihoods are not finite; its weights are damaged, or its training diverged.")
    write_bytes(Path(request["result"]), "".join(json.dumps(result) + "\n" for result in results).encode())


def _documents(reader: Reader, row: Mapping[str, Any], limit: int | None) -> list[Document]:
    try:
        documents = reader.documents(row)
    except Rejected as reason:
        raise DataError(f"{row['place']}: {reason}. Correct or remove it.") from None
    longest = max(len(one.ids) for one in documents)
    if limit and longest > limit:
        raise DataError(f"{row['place']}: {longest} tokens, more than the model's context of {limit}. Shorten or remove it.")
    if not all(one.loss[1:].any() for one in documents):
        raise DataError(f"{row['place']}: has no token to measure. Write more than one word, or remove it.")
    return documents


def main() -> int:
    """Run the request file that the command line names; a failure is told in its `outcome` file."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        run(request)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        write_json(Path(request["outcome"]), {"code": error.exit_code, "message": str(error)})
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
