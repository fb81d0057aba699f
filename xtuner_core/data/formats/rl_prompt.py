"""Prompts with a checkable answer, in verl's schema: `data_source`, `prompt`, `reward_model.ground_truth`."""

from __future__ import annotations

import json
from typing import Any

from xtuner_core.data.conversation import Message, Prompt
from xtuner_core.data.formats._parts import text
from xtuner_core.data.formats.preference import messages_of
from xtuner_core.data.jsonl import Rejected


def recognises(value: Any) -> str | None:
    """The keys prompt and reward_model."""
    return "'prompt' and 'reward_model'" if isinstance(value, dict) and {"prompt", "reward_model"} <= value.keys() else None


def parse(value: Any) -> Prompt:
    """One value → one prompt; an answer that is no text becomes its JSON.

    Raises:
        Rejected: no prompt, or no ground truth.
    """
    if not isinstance(value, dict):
        raise Rejected("expected an object with prompt and reward_model")
    prompt, reward, source = value.get("prompt"), value.get("reward_model"), value.get("data_source")
    messages = [Message("user", text(prompt, "prompt"))] if isinstance(prompt, str) else messages_of(prompt)
    if not messages or messages[-1].role == "assistant":
        raise Rejected("prompt: must have messages, and end before the assistant's turn")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    if truth is None:
        raise Rejected("reward_model: no ground_truth to check an answer against")
    return Prompt(tuple(messages), _as_text(truth), None if source is None else text(source, "data_source"))


def _as_text(truth: Any) -> str:
    if isinstance(truth, str):
        return text(truth, "reward_model: ground_truth")
    try:
        return json.dumps(truth, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Rejected(f"reward_model: ground_truth: {error}") from None
