"""Many texts to token ids: the tokenizers library, and in its place the fastokens library where that gives the same ids.

fastokens (Rust, no dependencies) is young, so it is used only behind three nets. It must give the reference's ids for some hundred
awkward texts before it is used at all; a batch that it refuses goes to the reference; and while it works, one text of a thousand is
encoded by both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from xtuner_core.errors import DataError

LOG = logging.getLogger(__name__)

Encoder = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts → their token ids end to end (uint32), and the number of tokens of each (int64)."""

SAMPLED = 1009
"""One text of so many is encoded by both libraries; a prime, so that a rhythm of user and assistant turns can't hide one of them."""
SMALLEST_BATCH = 32
"""Texts that the reference takes over at once when fastokens refuses one of them."""


def reference_encoder(tokenizer: Tokenizer) -> Encoder:
    """The tokenizers library itself."""

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        return np.fromiter(chain.from_iterable(ids), dtype=np.uint32, count=int(lengths.sum())), lengths

    return encode


def fast_encoder(tokenizer_json: str, reference: Tokenizer) -> Encoder | None:
    """fastokens for the tokenizer that `reference` was made from, or None, with the reason in the log, if it can't be trusted with it.

    It costs about as much as encoding 5 MB with the reference to start. The encoder raises what the reference raises for a text that
    neither takes, such as one with a lone surrogate.
    """
    slow = reference_encoder(reference)
    try:
        fast = _fastokens(tokenizer_json)
        reason = _difference(fast, slow, probes())
    except ImportError:
        reason = "the package fastokens is not installed"
    except BaseException as error:  # a panic in Rust is no Exception
        _raise_if_asked_to_stop(error)
        reason = f"fastokens refuses this tokenizer ({error})"
    if reason is not None:
        LOG.info("tokenizing with the tokenizers library: %s", reason)
        return None
    return checked(_falling_back(fast, slow), slow)


def checked(encoder: Encoder, reference: Encoder, every: int = SAMPLED) -> Encoder:
    """`encoder`, with one text of `every` compared with `reference`.

    Raises (the encoder, when called):
        DataError: the two differ.
    """
    seen = 0

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        nonlocal seen
        ids, lengths = encoder(texts)
        sample = range(-seen % every, len(texts), every)
        seen += len(texts)
        ends = np.cumsum(lengths) if sample else lengths
        for index in sample:
            if not np.array_equal(ids[ends[index] - lengths[index] : ends[index]], reference([texts[index]])[0]):
                raise DataError(
                    f"the libraries fastokens and tokenizers give different token ids for {texts[index][:200]!r}. "
                    "Uninstall fastokens (pip uninstall fastokens) and run the same command again; please report the text."
                )
        return ids, lengths

    return encode


def _fastokens(tokenizer_json: str) -> Encoder:
    from fastokens import Tokenizer as Fast

    fast = Fast.from_json_str(json.dumps(_in_one_pattern(json.loads(tokenizer_json))))

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = fast.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype=np.uint32), np.diff(np.frombuffer(offsets, dtype=np.uint64).astype(np.int64))

    return encode


def _falling_back(fast: Encoder, slow: Encoder) -> Encoder:
    """A batch that `fast` refuses is halved until few texts around the refused one are left for `slow`."""

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            return fast(texts)
        except BaseException as error:
            _raise_if_asked_to_stop(error)
        if len(texts) <= SMALLEST_BATCH:
            return slow(texts)
        middle = len(texts) // 2
        halves = encode(texts[:middle]), encode(texts[middle:])
        return np.concatenate([ids for ids, _ in halves]), np.concatenate([lengths for _, lengths in halves])

    return encode


def _raise_if_asked_to_stop(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        raise error


# --- the pre-tokenizer of GPT-2, which fastokens runs four times as fast as one pattern ---

# Character classes, for their tables differ: \s of fastokens' pattern library has U+180E, and of the tokenizers library only the step
# "Digits" knows those of Unicode 17.
_SPACE = r"\t-\r \x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_DIGIT = r"\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
_SPACES = rf"[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
_BEFORE_A_DIGIT = rf"[{_SPACE}]+(?=[{_DIGIT}])"
_ONE_PATTERN = {
    "[]": rf"{_WORD}| ?\p{{N}}+| ?[^{_SPACE}\p{{L}}\p{{N}}]+|{_SPACES}",
    '[{"individual_digits": true, "type": "Digits"}]': rf"{_WORD}|[{_DIGIT}]| ?[^{_SPACE}\p{{L}}{_DIGIT}]+|{_BEFORE_A_DIGIT}|{_SPACES}",
}
"""By the steps before the byte-level one: the pattern of Radford et al. (GPT-2, 2019), and the same with every digit apart."""


def _in_one_pattern(tree: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, with a byte-level pre-tokenizer that brings its own pattern (GPT-2's) as a split and a byte-level one."""
    steps = tree.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or not byte_level.get("use_regex", True) or byte_level.get("add_prefix_space", True):
        return tree
    pattern = _ONE_PATTERN.get(json.dumps(steps[:-1], sort_keys=True))
    if pattern is None:
        return tree
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {**tree, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}}


# --- the self-check ---

MOST_REFUSED = 0.1


def _difference(fast: Encoder, slow: Encoder, texts: Sequence[str]) -> str | None:
    """Why `fast` can't stand for `slow`. It may refuse a few texts (bytes that a vocabulary lacks), but must get no id wrong."""
    refused = 0
    for text in texts:
        try:
            ids, lengths = fast([text])
        except Exception:
            refused += 1
            continue
        expected, _ = slow([text])
        if not np.array_equal(ids, expected) or lengths.tolist() != [len(expected)]:
            return f"fastokens gives other ids for {text[:40]!r}"
    return f"fastokens refuses {refused} of {len(texts)} texts" if refused > MOST_REFUSED * len(texts) else None


def probes() -> list[str]:
    """Texts in which tokenizers differ: scripts, white space, digits, contractions, normal forms, control characters, control tokens."""
    around = [f"{before}{item}{after}" for item in _ITEMS for before, after in (("", ""), ("a ", " b"), ("\n", "  "), ("x", "1"))]
    return ["", *around, " ".join(_ITEMS), "".join(_ITEMS), "word " * 200, "ab" * 2000, " " * 500, "9" * 300]


_ITEMS = (
    *"aZ_'\"`~!?.,:;()[]{}<>/\\|@#$%^&*-+=0\t\r\n\x00\x01\x1b\x7f\x85\xa0\xad\xb2½Ⅷ٣\u200b\u200d\u2028\u202e\u3000\ufeff\ufffd\U0010ffff▁Ġ",
    *"\x1c\x1f\u1680\u180e\u205f\U00011de0\U00011de9\U00016ff4\U00016ff6\u0378\u2d2f\ua7d2\U0001e5f1\U0001ccf0",
    *("  ", "   ", "\n\n", "\r\n", " \n", "\n ", "\t\t", "\u3000\u3000", "12", "123", "1234", "12345", "3.14", "1,000,000", "0x7f", "१२३"),
    *(
        "it's",
        "WE'LL",
        "don't",
        "'s",
        "'S",
        "'re'",
        "’s",
        "ſ's",
        "I'd've",
        "camelCaseWord",
        "HTTPServer",
        "snake_case",
        "a-b",
        "x=y",
        "i++",
    ),
    *(
        "é",
        "e\u0301",
        "Å",
        "ﬁ",
        "①",
        "ｆｕｌｌ",
        "ǆ",
        "İı",
        "ß",
        "ẞ",
        "한국어",
        "\u1112\u1161\u11ab",
        "日本語テキスト",
        "カタカナ",
        "中文，标点。",
        "𠀀",
    ),
    *("Привет, мир", "Ελληνικά", "עִבְרִית", "العربية", "فارسی", "हिन्दी क्षि", "ไทยภาษา", "தமிழ்", "አማርኛ", "ქართული", "Tiếng Việt", "𝔘𝔫𝔦"),
    *(
        "🙂",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪",
        "#️⃣",
        "https://example.org/a?b=c#d",
        "def f(x):\n\treturn x\n",
        "<p>&amp;</p>",
        "{'a': [1, 2]}",
    ),
    *(
        "<|im_start|>",
        "<|im_end|>\n",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[INST]",
        "<start_of_turn>",
        "<|eot_id|>",
        "<think>",
    ),
)
"""What goes wrong where tokenizers differ, each alone and between other text."""
