"""Pictures of Prefect's pages for the docs, taken with Chromium from a real server with real, tiny runs: `make screenshots`.

python docs/screenshots.py [NAME ...]      all pictures, or only these
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image

DOCS = Path(__file__).resolve().parent
RECIPE = DOCS.parent / "tests" / "service" / "tiny.yaml"
KEY = "tiny-service"
WIDTH = 1400
HEIGHTS = {"run": 1250, "form": 1020, "recipe": 2000, "artifacts": 1100, "model-card": 1700, "report": 1900, "alerts": 700}
"""Picture → its height; docs/ui-NAME.png."""
COLOURS = 128
RENDER_MILLISECONDS = 15_000
"""Of the page's own clock, which runs as fast as the page can."""


def main(wanted: Sequence[str]) -> None:
    """Bring up a service, let it work, take the pictures, end it."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.service import down, up

    with tempfile.TemporaryDirectory(prefix="screenshots") as place:
        home = Path(place, "home")
        try:
            service = up(home, Path(place, "store"), str(RECIPE), free_port())
            with temporary_settings({PREFECT_API_URL: service.api}):
                pages = work()
                for name in wanted or HEIGHTS:
                    take(f"{service.ui}/v2{pages[name]()}", name)
        finally:
            down(home)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work() -> Mapping[str, Callable[[], str]]:
    """A first run, one that finds everything made, one that fails; picture → what finds the address of its page."""
    from prefect.deployments import run_deployment

    def run(*changes: str) -> str:
        ended = run_deployment("finetune-flow/finetune-flow", parameters={"changes": changes}, timeout=600, poll_interval=1)
        print(f"{ended.name}: {ended.state and ended.state.message}")
        return f"/runs/flow-run/{ended.id}"

    run("promotion.when=gate")
    cached = run("promotion.when=gate")
    run("data.train=data/hostile/broken_json.jsonl")
    time.sleep(8)  # the watcher looks every five seconds
    return {
        "run": lambda: f"{cached}?tab=TaskRuns",
        "form": lambda: f"/deployments/deployment/{deployment()}/run",
        "recipe": lambda: f"/deployments/deployment/{deployment()}/run?parameters={whole_recipe()}",
        "artifacts": lambda: "/artifacts",
        "model-card": lambda: artifact(f"{KEY}-model-card"),
        "report": lambda: artifact(f"{KEY}-report", newest=False),
        "alerts": lambda: artifact("finetune-alerts"),
    }


def deployment() -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return str(client.read_deployment_by_name("finetune-flow/finetune-flow").id)


def whole_recipe() -> str:
    """The recipe with all its fields, as the form takes what it begins with."""
    from pipelines.recipe import load_recipe

    return quote(json.dumps({"recipe": load_recipe(str(RECIPE)).model_dump(mode="json")}))


def artifact(key: str, newest: bool = True) -> str:
    """The address of the last (or first) version."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])), sort=ArtifactSort.CREATED_DESC, limit=20
        )
    return f"/artifacts/artifact/{found[0 if newest else -1].id}"


def take(address: str, name: str) -> None:
    """One picture, with few colours to be small."""
    target = DOCS / f"ui-{name}.png"
    with tempfile.TemporaryDirectory(prefix="chromium") as profile:
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--enable-unsafe-swiftshader", f"--user-data-dir={profile}"]
        options += [f"--window-size={WIDTH},{HEIGHTS[name]}", f"--virtual-time-budget={RENDER_MILLISECONDS}", f"--screenshot={target}"]
        subprocess.run([chromium(), *options, address], check=True, capture_output=True, timeout=180)
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)
    print(f"{target} {target.stat().st_size // 1000} kB")


def chromium() -> str:
    """The browser, whatever it is called here."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    sys.exit("error: no Chromium here; install it (Debian: apt-get install chromium).")


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent))
    main(sys.argv[1:])
