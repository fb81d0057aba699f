"""One run computes at a time: its stages take the only slot of the server's limit `accelerator`, in turn with those of other runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from httpx import HTTPError, HTTPStatusError, TransportError, codes
from prefect import get_run_logger
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import PrefectException
from prefect.runtime import deployment
from prefect.settings import PREFECT_API_URL

from pipelines import chat, convert, evaluate, train
from pipelines.stage import Stage
from xtuner_core.errors import UserError

LIMIT = "accelerator"
LEASE_SECONDS = 60
"""The slot of a holder that was killed is free after so long."""
POLL_SECONDS = 2
COMPUTING = (train.STAGE, convert.STAGE, evaluate.STAGE, chat.STAGE)


@contextmanager
def accelerator(stage: Stage) -> Iterator[None]:
    """Wait for the slot and hold it, if the stage computes and others may. A server that is away at the end costs the slot for
    LEASE_SECONDS, not what was made.

    Raises:
        UserError: the run is a deployment's, and the server has no such limit. (One by hand goes without: a temporary server has none.)
    """
    if stage not in COMPUTING or not PREFECT_API_URL.value():
        yield
        return
    slot = _taken()
    try:
        yield
    finally:
        try:
            slot.__exit__(None, None, None)
        except (HTTPError, PrefectException, OSError) as error:
            get_run_logger().warning("the accelerator's slot could not be given back (%s); it is free in %s s", error, LEASE_SECONDS)


def _taken() -> AbstractContextManager[None]:
    """Asked for again and again, also while the server is away: a run must not fail because someone restarts it."""
    waiting = False
    while True:
        slot = concurrency(
            LIMIT,
            strict=deployment.id is not None,
            max_retries=0,
            lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )
        try:
            slot.__enter__()
            return slot
        except ConcurrencySlotAcquisitionError as error:
            if not _may_come(error.__cause__):
                raise UserError(f"the limit {LIMIT}: {error}. `xtuner up` creates it.") from error
            if not waiting:
                get_run_logger().info("waiting for the limit %s: another run computes now, or the server is away", LIMIT)
        waiting = True
        time.sleep(POLL_SECONDS)


def _may_come(cause: BaseException | None) -> bool:
    if isinstance(cause, HTTPStatusError):
        return cause.response.status_code == codes.LOCKED or cause.response.is_server_error
    return isinstance(cause, TransportError)
