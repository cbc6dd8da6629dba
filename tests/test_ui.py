"""Prefect's real UI in a real browser, on a server with authentication and CSRF protection."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from npo_core.artifacts import RunArtifacts, open_run
from npo_core.workspace import now
from schemas.decisions import DecisionRecord
from tests.command import last_json, npo, run_arguments
from tests.prefect_stack import client_of, process_worker
from tests.prefect_ui import SHOWN, prefect_ui, web_server

pytestmark = pytest.mark.slow

OTHER_LINK = ".//a[not(contains(@href, '/seen/reports/report-'))]"
HOSTILE = (
    "<img src=x onerror=alert(1)> <script>alert(2)</script> ![p](http://evil.example/p) [l](javascript:alert(3)) "
    "http://evil.example www.evil.example me@evil.example **b** | `c` | \\"
)


@pytest.fixture(scope="module")
def run(deployed: dict[str, str]) -> Iterator[RunArtifacts]:
    """A small finished run, whose store a browser reads at `run.public_url`; a decision's reason is hostile."""
    store = deployed["NPO_STORE"]
    folder = Path(store.removeprefix("file://"))
    folder.mkdir(exist_ok=True)
    with web_server(folder) as address:
        last_json(npo(*run_arguments("testbed-grpo", store, "seen", run__public_url=address), "--json", env=deployed))
        made = open_run(f"{store}/seen")
        head = made.head()
        assert head is not None
        made.commit_decision(
            DecisionRecord(
                leg_id=head.leg_id, step=8, intervene=False, reason=HOSTILE, source="schedule", created_at=now()
            )
        )
        yield made


def test_a_stage_is_started_in_the_ui_and_its_artifact_read_there(
    deployed: dict[str, str], run: RunArtifacts, tmp_path: Path
) -> None:
    before = {made.eval_id for made in run.evaluations()}
    with process_worker(deployed), prefect_ui(deployed, tmp_path) as ui:
        ui.find_deployment("evaluate", "default")
        ui.click("//button[normalize-space()='Run']")
        ui.click("//*[@role='menuitem'][normalize-space()='Custom run']")
        parameter = "//label[normalize-space()='{}']/ancestor::div[contains(@class, 'group')][1]"
        uri = ui.see(parameter.format("run") + "//textarea")
        uri.clear()
        uri.send_keys(run.uri)
        ui.click(parameter.format("step (Optional)") + "//button[normalize-space()='int']")
        ui.see(parameter.format("step (Optional)") + "//input").send_keys("6")
        ui.click("//button[normalize-space()='Submit']")

        ui.click(f"//main//a[contains(@href, '/runs/flow-run/')][contains(., '{run.uri}')]")
        ui.see("//main//*[normalize-space(text())='Completed']")
        ui.see(f"//main//*[contains(text(), \"Beginning flow run 'evaluate {run.uri}'\")]")
        ui.see("//main//*[contains(text(), 'Finished in state Completed()')]")
        (evaluation,) = (made for made in run.evaluations() if made.eval_id not in before)
        assert evaluation.checkpoint.step == 6

        ui.click("//button[@role='tab'][normalize-space()='Artifacts']")
        ui.click("//main//a[contains(., 'summary-seen')]")
        summary = ui.open_artifact("summary-seen")
        address, width = ui.loaded_picture()
        assert address.startswith("http://127.0.0.1:")
        assert width > 0
        assert f"{evaluation.accuracy:.3f}" in ui.see("//tr[td[1][normalize-space()='6']]/td[2]").text
        assert HOSTILE in summary.text.replace("\u2060", "")
        assert [i.get_attribute("src") for i in summary.find_elements(By.TAG_NAME, "img")] == [address]
        markup = summary.find_elements(By.XPATH, f"{OTHER_LINK} | .//script | .//td[contains(., 'alert')]//*")
        assert [found.get_attribute("outerHTML") for found in markup] == []

        ui.open_artifact("metrics-seen")
        last = run.segments(run.legs()[-1].leg_id)[-1]
        ui.see(f"{SHOWN}//tr[td[1][normalize-space()='{last.start}']][td[2][normalize-space()='{last.stop}']]")


def test_the_summary_of_a_whole_run_links_the_report(deployed: dict[str, str], run: RunArtifacts) -> None:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    with client_of(deployed) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["summary-seen"])), sort=ArtifactSort.CREATED_DESC
        )
    line = next(line for made in found for line in str(made.data).splitlines() if line.startswith("- report "))
    address = line.partition("](")[2].removesuffix(")")
    with urllib.request.urlopen(address) as response:
        assert response.headers.get_content_type() == "text/html"
