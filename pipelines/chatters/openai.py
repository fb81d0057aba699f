"""A server that runs already, at any URL that speaks OpenAI's protocol; its key is in the environment variable OPENAI_API_KEY."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

from pipelines.chatters import Endpoint, Request
from pipelines.stage import Log
from xtuner_core.errors import RecipeError, UserError

KEY = "OPENAI_API_KEY"
TIMEOUT = 20


def unavailable() -> str | None:
    """Any machine can ask one."""
    return None


@contextmanager
def serve(request: Request, log_file: Path, log: Log) -> Iterator[Endpoint]:
    """The model at `request.url`; where a server has several, the URL ends in `#NAME`.

    Raises:
        RecipeError: no URL, or not clear which model.
        UserError: the server does not answer as it should.
    """
    if not _is_address(request.url or ""):
        raise RecipeError(
            "chatter openai needs the server's address, such as http://127.0.0.1:8000/v1 (chat.url of the recipe, or --url); "
            f"a key belongs into the environment variable {KEY}."
        )
    url, model = urldefrag(request.url or "")
    key, url = _key(), url.rstrip("/")
    name = model or _only(_models(url, key), url)
    log(f"chat: the model is {name} at {url}")
    yield Endpoint(url, name, key)


def _is_address(url: str) -> bool:
    """Whether it is one of a server, without a secret in it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # such as a port of letters
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and not (parts.username or parts.query)


def _key() -> str:
    key = os.environ.get(KEY, "").strip() or "none"
    if not all("!" <= letter <= "~" for letter in key):  # httpx would show it in its complaint
        raise RecipeError(f"the environment variable {KEY} holds spaces or letters that no key has.")
    return key


def _models(url: str, key: str) -> list[str]:
    import httpx

    here = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    try:
        answer = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT, trust_env=not here)
        answer.raise_for_status()
        return [str(model["id"]) for model in answer.json()["data"]]
    except httpx.HTTPStatusError as error:
        hint = f"; is {KEY} set to its key?" if error.response.status_code in (401, 403) else ""
        raise UserError(f"{url}/models answers with status {error.response.status_code}{hint}") from None
    except httpx.HTTPError as error:
        raise UserError(f"{url}/models does not answer: {error}. Check chat.url and whether the server runs.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{url}/models does not answer as an OpenAI server does; the URL usually ends in /v1.") from None


def _only(models: list[str], url: str) -> str:
    if len(models) != 1:
        shown = ", ".join(models[:5]) + (" …" if len(models) > 5 else "")
        raise RecipeError(f"{url} has {len(models)} models ({shown}); say which one: {url}#NAME.")
    return models[0]
