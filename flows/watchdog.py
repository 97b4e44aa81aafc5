"""A killed run cannot say that it is over: the server finds out by the heartbeats that stay away."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from prefect import tags
from prefect.automations import AutomationCore
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.settings import get_current_settings

HEARTBEAT_SECONDS = 30
"""Between two heartbeats of a run; the least that Prefect allows."""
SILENCE = timedelta(seconds=90)
"""Three heartbeats missed and a run counts as killed."""
TAG = "heartbeat-30s"
"""Carried by runs that beat that often: another flow, with Prefect's 180 s, would be taken for dead."""
AUTOMATION = "rgcp: runs that were killed"


@contextmanager
def heartbeat_tags() -> Iterator[None]:
    """Tag the flow runs started within, if they will beat often enough to be watched."""
    frequency = get_current_settings().flows.heartbeat_frequency
    if frequency is None or frequency > HEARTBEAT_SECONDS:
        yield
        return
    with tags("rgcp", TAG):
        yield


def watch_for_killed_runs() -> None:
    """Let the server turn runs to Crashed whose heartbeats stay away; done once, it stays in its database."""
    final = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")
    over = [f"prefect.flow-run.{state}" for state in final]
    automation = AutomationCore(
        name=AUTOMATION,
        description="A run that was killed, or whose machine is gone, cannot report it.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *over},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related={"prefect.resource.id": f"prefect.tag.{TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                message="No heartbeat for 90 s: it was killed.",
                force=False,
            )
        ],
    )
    with get_client(sync_client=True) as client:
        known = client.request("POST", "/automations/filter", json={"automations": {"name": {"any_": [AUTOMATION]}}})
        if not known.json():
            client.request("POST", "/automations/", json=automation.model_dump(mode="json", exclude_unset=True))
