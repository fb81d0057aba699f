"""What stands before a server that others reach, in front of a real one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.unit.pipelines.chatters.conftest import Serve, until

TOKEN = "0123456789abcdef"


@pytest.fixture
def guarded(serve: Serve) -> Iterator[httpx.Client]:
    with serve("obeys", token=TOKEN) as endpoint, httpx.Client(base_url=endpoint.base_url, trust_env=False, timeout=30) as client:
        yield client


def _ask(words: str) -> dict[str, object]:
    return {"model": "model", "messages": [{"role": "user", "content": words}]}


def test_only_who_has_the_token_comes_in_and_only_to_what_a_chat_needs(guarded: httpx.Client) -> None:
    own = {"Authorization": f"Bearer {TOKEN}"}
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": f"Bearer {TOKEN}x"}):
        assert guarded.post("/chat/completions", json=_ask("hi"), headers=wrong).status_code == 401
        assert guarded.get("/models", headers=wrong).status_code == 401
    assert guarded.post("/chat/completions", json=_ask("hi you"), headers=own).text == "data: hi\n\ndata: you\n\n"
    assert [model["id"] for model in guarded.get("/models", headers=own).json()["data"]] == ["model"]
    root = str(guarded.base_url).removesuffix("/v1/")
    assert guarded.get(f"{root}/environment", headers=own).status_code == 404, "the server's other addresses stay inside"
    assert guarded.get(f"{root}/health").status_code == 200
    assert guarded.get(f"{root}/health", headers={"Host": "evil.example"}).status_code == 400

    too_long = guarded.post("/chat/completions", json=_ask("x" * 2**20), headers=own)
    assert (too_long.status_code, too_long.json()["error"]["message"]) == (413, "longer than 1048576 bytes")


def test_an_answer_streams_through_and_ends_when_its_reader_goes(guarded: httpx.Client, tmp_path: Path) -> None:
    own = {"Authorization": f"Bearer {TOKEN}"}
    with guarded.stream("POST", "/chat/completions", json=_ask("one two three four five"), headers=own) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        times = [time.monotonic() for _ in answer.iter_raw()]
    assert times[-1] - times[0] > 0.25, "the pieces came all at once"

    with guarded.stream("POST", "/chat/completions", json=_ask("word " * 2000), headers=own) as answer:
        next(answer.iter_raw())
    assert until((tmp_path / "client-went").exists), "the server goes on answering nobody"


def test_the_token_is_in_no_argument_list_and_in_no_log(guarded: httpx.Client, tmp_path: Path) -> None:
    guarded.post("/chat/completions", json=_ask("a private word"), headers={"Authorization": f"Bearer {TOKEN}"})
    lists = [one.cmdline() for one in psutil.Process().children(recursive=True)]
    assert any("_guard.py" in word for words in lists for word in words)
    assert TOKEN not in json.dumps(lists)
    log = (tmp_path / "server.log").read_text()
    assert TOKEN not in log and "private" not in log


def test_a_server_that_ended_is_told_to_the_client(guarded: httpx.Client, tmp_path: Path) -> None:
    psutil.Process(int((tmp_path / "family").read_text().split()[0])).kill()
    answer = guarded.post("/chat/completions", json=_ask("hi"), headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, 502)
