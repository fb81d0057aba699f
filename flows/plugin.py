"""`prefect deployment run finetune-flow`: a deployment that has its flow's name is found by that name alone.

Prefect loads this module as a plugin (entry point group prefect.plugins; prefect.toml turns plugins on for commands in this folder) and
wants FLOW/DEPLOYMENT. No hook of its plugins reaches that far, so a method of its client is replaced, in `prefect deployment ...` only.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse


def accept_bare_names() -> None:
    """NAME stands for NAME/NAME."""
    from prefect.client.orchestration import PrefectClient

    read = PrefectClient.read_deployment_by_name

    async def read_deployment_by_name(self: PrefectClient, name: str) -> DeploymentResponse:
        return await read(self, name if "/" in name else f"{name}/{name}")

    PrefectClient.read_deployment_by_name = read_deployment_by_name


if {"deployment", "deployments"} & set(sys.argv[1:]):
    accept_bare_names()
