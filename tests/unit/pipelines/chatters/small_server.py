"""A small real server in the ways of large ones: `python small_server.py PORT FOLDER BEHAVIOUR`.

Like LMDeploy and vLLM it starts an engine in a session of its own, which here also ignores SIGTERM; and another one that it disowns.
Writes the numbers of all its processes to FOLDER/family.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENGINE = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(120)"
DISOWNED = "import time; time.sleep(120)"
DISOWN = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=2, start_new_session=True).pid)"


class Answers(BaseHTTPRequestHandler):
    """Health; the models; the environment; and the request's words, one piece each tenth of a second, until the client goes."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        sick, locked = self.server.behaviour == "sick", self.server.behaviour == "locked" and self.path == "/v1/models"
        told = {
            "/health": "",
            "/environment": json.dumps(dict(os.environ)),
            "/v1/models": json.dumps({"data": [{"id": name} for name in self.server.behaviour.split(",")]}),
        }
        refused = locked and self.headers["Authorization"] != "Bearer the-right-key"
        self.send_response(503 if sick else 401 if refused else 200 if self.path in told else 404)
        self.end_headers()
        self.wfile.write(told.get(self.path, "").encode())

    def do_POST(self) -> None:
        words = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"].split()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for word in words:
                self.wfile.write(f"data: {word}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.1)
        except OSError:
            Path(self.server.folder, "client-went").touch()


def main(port: str, folder: str, behaviour: str) -> None:
    if behaviour == "dies":
        sys.exit("no such weights")
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE, start_new_session=True)
    assert engine.stdout
    engine.stdout.readline()
    disowned = subprocess.run([sys.executable, "-c", DISOWN, DISOWNED], stdout=subprocess.PIPE, text=True, check=True).stdout
    Path(folder, "family.part").write_text(f"{os.getpid()} {engine.pid} {disowned}")
    os.rename(Path(folder, "family.part"), Path(folder, "family"))
    if behaviour == "late":
        time.sleep(120)
    server = ThreadingHTTPServer(("127.0.0.1", int(port)), Answers)
    server.behaviour, server.folder = behaviour, folder
    print("listening", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
