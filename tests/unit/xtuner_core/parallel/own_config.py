"""One rank under torchrun, `xtuner_core.sft` with a config of its own: `own_config.py FOLDER` reads FOLDER/config-RANK.json."""

from __future__ import annotations

import os
import sys

from xtuner_core.parallel.mesh import leave
from xtuner_core.sft import main

leave(main(["--config", f"{sys.argv[1]}/config-{os.environ['RANK']}.json"]))
