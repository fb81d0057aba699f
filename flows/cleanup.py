"""`cleanup`: the store's daily clean-up, with a table of what went and why."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from prefect import State, flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.states import Completed
from pydantic import Field

from flows.caching import failed
from pipelines.artifacts import Store
from pipelines.cleanup import Outcome, clean, parse_age, parse_size, told
from xtuner_core.errors import UserError, from_os_error

Size = Annotated[str, Field(pattern=r"(?i)^\s*\d+(\.\d+)?\s*[kMGT]?i?B?\s*$")]
Age = Annotated[str, Field(pattern=r"^\s*\d+(\.\d+)?\s*[hdw]\s*$")]


@flow(name="cleanup", flow_run_name="cleanup", persist_result=False)
def cleanup(
    store: Path = Path("artifacts"), budget: Size | None = None, older_than: Age | None = None, dry_run: bool = False
) -> State[Any]:
    """Remove from the store what nobody needs, longest unused first. Never removed: of each model the version in production, the one before
    it and the newest one, what is pinned, what a run uses, and all that these were made from.

    Args:
        store: Folder of the artifacts, on the machine that runs it; relative to the project.
        budget: Room on disk that the store may take, such as 200GB; none for no limit.
        older_than: Remove what was not used for so long, such as 30d; none for whatever fits the budget.
        dry_run: Only show what would go.
    """
    log = get_run_logger()
    try:
        limit, age = parse_size(budget) if budget else None, parse_age(older_than) if older_than else None
        outcome = clean(Store(store), limit, age, log.info, dry_run)
    except UserError as error:
        return failed(error)
    except OSError as error:
        return failed(from_os_error(error))
    summary = told(outcome, dry_run)
    create_table_artifact(_rows(outcome), key="cleanup", description=summary)
    emit_event(
        "finetune.store.cleaned",
        {"prefect.resource.id": f"finetune.store.{Store(store).root.name}"},
        payload={"removed": len(outcome.removed), "before": outcome.before, "after": outcome.after, "dry_run": dry_run},
    )
    return Completed(message=summary)


def _rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "what": one.kind,
            "stage/key": one.name,
            "recipe": one.recipe,
            "bytes": one.size,
            "last used": datetime.fromtimestamp(one.used, UTC).isoformat(timespec="minutes"),
            "why": one.why,
        }
        for one in outcome.removed
    ]
