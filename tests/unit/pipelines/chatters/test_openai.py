"""A server that runs already: found, with its model and the key of the environment, or told why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.chatters import Endpoint, Request, openai
from pipelines.chatters._server import usable_port
from tests.unit.pipelines.chatters.conftest import Serve
from xtuner_core.errors import RecipeError, UserError


def _found(url: str | None) -> Endpoint:
    with openai.serve(Request(Path("unused"), url=url), Path("unused"), print) as endpoint:
        return endpoint


def test_its_model_is_found_and_one_of_several_is_named(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serve("only") as running:
        assert _found(running.base_url + "/") == Endpoint(running.base_url, "only", "none")
    with serve("one,two") as running:
        with pytest.raises(RecipeError, match=r"has 2 models \(one, two\); say which one: http"):
            _found(running.base_url)
        assert _found(running.base_url + "#two").model == "two"


def test_the_key_is_the_environment_s_and_never_shown(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve("locked") as running:
        monkeypatch.setenv("OPENAI_API_KEY", "the-wrong-key")
        with pytest.raises(UserError, match="status 401; is OPENAI_API_KEY set to its key") as caught:
            _found(running.base_url)
        assert "wrong" not in str(caught.value)
        monkeypatch.setenv("OPENAI_API_KEY", "the-right-key\n")
        assert _found(running.base_url).api_key == "the-right-key"
        monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
        with pytest.raises(RecipeError, match="holds spaces or letters that no key has") as caught:
            _found(running.base_url)
        assert "lines" not in str(caught.value)


ODD = ("http://host:port/v1", "http://host:99999/v1#model", "http://[::1/v1")


@pytest.mark.parametrize(
    "url", [None, "", "127.0.0.1:8000", "ftp://host/v1", "http://user:secret@host/v1", "http://host/v1?key=secret", *ODD]
)
def test_an_address_that_is_none_is_refused(url: str | None) -> None:
    with pytest.raises(RecipeError, match="needs the server's address") as caught:
        _found(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_or_none_of_openai_s(serve: Serve) -> None:
    with pytest.raises(UserError, match=r"/models does not answer: .*refused"):
        _found(f"http://127.0.0.1:{usable_port(None)}/v1")
    with serve("obeys") as running, pytest.raises(UserError, match=r"/environment/models answers with status 404"):
        _found(running.base_url.replace("/v1", "/environment"))
