"""Thousands of damaged lines of every format through the reader and the parser: a sample or a reason, never a crash or a hang."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtuner_core import registry
from xtuner_core.data import formats
from xtuner_core.data.inputs import Part, Row, rows
from xtuner_core.data.jsonl import Rejected
from xtuner_core.errors import DataError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\na", "weight": 1}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SPOKEN = [("human", "q"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "1"), ("gpt", "a")]
PAIR = {"chosen": [TURNS[0], {"role": "assistant", "content": "a"}], "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]}
GOOD: dict[str, list[Any]] = {
    "openai": [TURNS, {"messages": [*TURNS, CALL, {"role": "tool", "content": [{"type": "text", "text": "1"}]}, TURNS[1]], "tools": TOOLS}],
    "sharegpt": [{"conversations": [{"from": who, "value": said} for who, said in SPOKEN], "system": "s", "tools": json.dumps(TOOLS)}],
    "alpaca": [{"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["q", "a"], ["r", "b"]]}],
    "xtuner": [{"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "r", "output": "b", "output_with_loss": False}]}],
    "text": [{"text": "words"}, {"messages": [{"role": "pretrain", "content": "words"}]}],
    "preference": [PAIR, {"prompt": "q", "chosen": "a", "rejected": "b"}],
    "rl_prompt": [{"data_source": "d", "prompt": [TURNS[0]], "reward_model": {"ground_truth": "72", "style": "rule"}}],
}
LINES, EXAMPLES = 25, 80
"""Lines in a file, files a format: 14,000 lines in all."""
JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    0.5,
    10**30,
    "",
    "x",
    "\0",
    "<think>",
    "</think>",
    "[{",
    [],
    {},
    [[]],
    {"role": "user"},
    [None],
    ["x", 1],
]
BYTES = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\u0000",
    b"\\ud800",
    b"\x00",
    b"\xff",
    b"NaN",
    b"1e999",
    b"null",
    b",",
    b":",
    b"\r",
    b"\n",
    b"[" * 70,
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(Container, key or index) of everything in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((value, key), *places(item))]


def reshaped(value: Any, chance: random.Random) -> Any:
    """A copy with a key renamed or removed, a part replaced, moved, repeated or nested."""
    value = json.loads(json.dumps(value))
    container, key = chance.choice(places(value))
    match chance.randrange(6):
        case 0:
            container[key] = chance.choice(JUNK)
        case 1:
            del container[key]
        case 2 if isinstance(container, dict):
            container[chance.choice(["role", "content", "from", "text", "loss", "chosen", "id", key.upper()])] = container.pop(key)
        case 3:
            for _ in range(chance.choice([1, 3, 80])):
                container[key] = {"x": container[key]} if chance.random() < 0.5 else [container[key]]
        case 4:
            other, where = chance.choice(places(value))
            container[key], other[where] = json.loads(json.dumps(other[where])), json.loads(json.dumps(container[key]))
        case _ if isinstance(container, list):
            container.extend(json.loads(json.dumps(container)))
    return value


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """A byte flipped, a stretch cut out or repeated, something put in, or the end cut off."""
    at, length = chance.randrange(len(raw)), chance.randrange(1, 20)
    match chance.randrange(5):
        case 0:
            return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
        case 1:
            return raw[:at] + raw[at + length :]
        case 2:
            return raw[: at + length] + raw[at:]
        case 3:
            return raw[:at] + chance.choice(BYTES) + raw[at:]
        case _:
            return raw[:at]


def mutated(value: Any, chance: random.Random) -> bytes:
    for _ in range(chance.randrange(3)):
        value = reshaped(value, chance) if places(value) else value
    raw = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(chance.randrange(3)):
        raw = damaged(raw, chance) or b" "
    return raw


def outcome(row: Row, parse: Callable[[Any], Any]) -> str:
    if row.blank:
        return "blank"
    try:
        if row.reason is not None:
            raise Rejected(row.reason)
        sample = parse(row.value)
    except Rejected as reason:
        assert str(reason).encode("utf-8") and len(str(reason)) < 10_000  # it goes into the report
        return "rejected"
    json.dumps(asdict(sample), ensure_ascii=False, allow_nan=False).encode("utf-8")  # what is accepted can be stored
    return "accepted"


@pytest.mark.parametrize("name", GOOD)
def test_the_lines_are_good_before_they_are_damaged(name: str) -> None:
    assert all(registry.find(formats, name).parse(value) for value in GOOD[name])
    assert set(GOOD) == set(registry.names(formats))


@pytest.mark.parametrize("name", GOOD)
def test_a_damaged_line_is_a_sample_or_a_reason(name: str, tmp_path: Path) -> None:
    parse, counts = registry.find(formats, name).parse, Counter[str]()
    file = tmp_path / "damaged.jsonl"

    @given(seed=st.integers(0, 2**63))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def feed(seed: int) -> None:
        chance = random.Random(seed)
        content = b"\n".join(mutated(chance.choice(GOOD[name]), chance) for _ in range(LINES))
        file.write_bytes(content)
        start = time.monotonic()
        outcomes = Counter(outcome(row, parse) for row in rows(Part(file)))
        assert time.monotonic() - start < 10
        assert outcomes.total() == content.count(b"\n") + (not content.endswith(b"\n"))
        counts.update(outcomes)

    feed()
    assert counts.total() >= 0.9 * LINES * EXAMPLES  # hypothesis may draw a seed twice
    assert counts["accepted"] > 100 and counts["rejected"] > 300


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "arrow", "jsonl.gz", "jsonl.zst"])
@given(seed=st.integers(0, 2**63))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_damaged_file_is_rows_or_a_data_error(kind: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, chance = tmp_path_factory.getbasetemp(), random.Random(seed)
    good = folder / f"good.{kind}"
    if not good.is_file():
        write_good(good)
    raw = good.read_bytes()
    for _ in range(chance.randrange(1, 4)):
        raw = damaged(raw, chance) or b" "
    file = folder / f"damaged.{kind}"
    file.write_bytes(raw)
    try:
        outcomes = Counter(outcome(row, formats_openai) for row in rows(Part(file)))
    except DataError as error:
        assert file.name in str(error)
        return
    assert outcomes.total() < 200


def formats_openai(value: Any) -> Any:
    return registry.find(formats, "openai").parse(value)


def write_good(file: Path) -> None:
    """Forty conversations as a file of the kind that its name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"id": number, "messages": TURNS} for number in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    table = pa.Table.from_pylist(records)
    match file.name.removeprefix("good."):
        case "json":
            file.write_text(json.dumps(records))
        case "csv":
            quoted = json.dumps(TURNS).replace('"', '""')
            file.write_text("id,messages\n" + "".join(f'{number},"{quoted}"\n' for number in range(40)))
        case "parquet":
            pq.write_table(table, file)
        case "arrow":
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
        case _:
            with pa.output_stream(str(file)) as stream:
                stream.write(lines)
