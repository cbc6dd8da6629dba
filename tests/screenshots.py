"""The README's pictures of Prefect's UI, made anew: `python -m tests.screenshots`, some minutes.

A whole run of NPO on the testbed, on a server of its own; nothing is left of either but the pictures.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import DeploymentStatus

from tests.command import ROOT, last_json, npo
from tests.prefect_stack import bootstrap, client_of, eventually, process_worker, protected_server
from tests.prefect_ui import SHOWN, prefect_ui, web_server

DEPLOYMENTS, SUMMARY = ROOT / "deploy" / "ui-deployments.png", ROOT / "deploy" / "ui-summary.png"


def ready(client: Any) -> bool:
    """Whether a worker serves every deployment of the process pool."""
    deployments = [d for d in client.read_deployments(limit=200) if d.work_pool_name == "npo-process"]
    return all(deployment.status == DeploymentStatus.READY for deployment in deployments)


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "runs").mkdir()
        with protected_server(folder) as server, web_server(folder / "runs") as address:
            assert bootstrap(server).returncode == 0
            settings = {"run.store": server["NPO_STORE"], "run.public_url": address}
            overrides = [part for name, value in settings.items() for part in ("-s", f"{name}={value}")]
            config = "deploy/configs/testbed-npo.yaml"
            last_json(npo("run", config, *overrides, "--json", env=server, timeout=1800))
            with process_worker(server), prefect_ui(server, folder) as ui:
                with client_of(server) as client:
                    eventually(lambda: ready(client), "the worker asks for flow runs")
                ui.browser.set_window_size(1100, 760)
                ui.click("//a[normalize-space()='Deployments']")
                ui.see("//tr[.//a[normalize-space()='evaluate']]//*[normalize-space()='Ready']")
                ui.browser.save_screenshot(str(DEPLOYMENTS))
                ui.browser.set_window_size(1000, 1250)
                ui.open_artifact("summary-testbed-npo")
                ui.loaded_picture()
                ui.see(SHOWN).screenshot(str(SUMMARY))


if __name__ == "__main__":
    main()
