"""Run by the Python of another environment: which of the given versions and modules it lacks, one line each.

Read from standard input: {"versions": {package: version}, "modules": [name]}.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout


def complaints(versions: Mapping[str, str], modules: Sequence[str]) -> Iterator[str]:
    """A build's own suffix (2.13.0+cpu) does not count."""
    for package, wanted in versions.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "not there"
        if found.partition("+")[0] != wanted:
            yield f"{package} is {found}, pinned is {wanted}"
    for module in modules:
        try:
            with redirect_stdout(sys.stderr):  # what a module says when it is imported is no complaint
                importlib.import_module(module)
        except Exception as error:
            yield f"{module} does not import: {type(error).__name__}: {error}"


if __name__ == "__main__":
    for line in list(complaints(**json.load(sys.stdin))):
        print(line)
