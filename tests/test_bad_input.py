"""Bad input ends with exit code 1 or 2 and one message that names the thing and the remedy. What is committed stays."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from npo_core import testbed
from npo_core.artifacts import RunArtifacts, open_run
from tests.command import ROOT, fingerprint, last_json, npo, run_arguments

pytestmark = pytest.mark.slow

TINY = {
    "run__total_steps": 4,
    "data__held_out": 8,
    "evaluation__every": 2,
    "evaluation__samples": 1,
    "future__interventions__0__lookahead": 2,
    "future__interventions__0__window": 2,
}
AT_ONCE = 2
"""Commands that run side by side: a command's start is most of its time."""


@dataclass(frozen=True)
class Place:
    """Where one case happens: a folder of its own that holds a copy of a finished NPO run."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def run(self) -> RunArtifacts:
        return open_run(f"file://{self.store}/demo")

    def one(self, pattern: str) -> Path:
        """The last file of the run that matches."""
        return sorted((self.store / "demo").glob(pattern))[-1]

    def in_tip(self, pattern: str) -> Path:
        """The same in the head's leg."""
        head = self.run.head()
        assert head is not None
        return self.one(f"legs/{head.leg_id}/{pattern}")

    def again(self, **overrides: object) -> list[str]:
        """Arguments of the command that made the run, with changes."""
        return train(self.store, **overrides)


def train(store: Path, name: str = "demo", **overrides: object) -> list[str]:
    return run_arguments("testbed-npo", store, name, **{**TINY, **overrides})


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_refused(result: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """One message, the right exit code, no traceback."""
    told = result.stdout + result.stderr
    assert result.returncode == code, told
    assert "Traceback" not in told
    assert result.stderr.count("npo: error: ") == 1, told
    message = result.stderr.partition("npo: error: ")[2]
    assert len(message) < 1000, message
    for pattern in said:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"


# ---- damages and commands; each returns the arguments of the command that must be refused


@dataclass(frozen=True)
class Case:
    """One bad input: what to do before, the command, and what it must say."""

    prepare: Callable[[Place], Sequence[object]]
    code: int
    said: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    seconds: float = 120


def below_a_file(place: Place) -> Sequence[object]:
    (place.folder / "file").write_text("")
    return train(place.folder / "file" / "store")


def unsupported_protocol(place: Place) -> Sequence[object]:
    return place.again(run__store="ftp://host/store")


def changed_recipe(place: Place) -> Sequence[object]:
    return place.again(learner__learning_rate="3e-3", rollout__group_size=4)


def truncated(pattern: str, *command: str) -> Callable[[Place], Sequence[object]]:
    def prepare(place: Place) -> Sequence[object]:
        path = place.one(pattern)
        os.truncate(path, path.stat().st_size - 100)
        return [*command, place.run.uri]

    return prepare


def edited(pattern: str, *command: str) -> Callable[[Place], Sequence[object]]:
    """Rewrites a file as valid Parquet with one row less, as an editor of tables would."""

    def prepare(place: Place) -> Sequence[object]:
        path = place.one(pattern)
        table = pq.read_table(path)
        pq.write_table(table.slice(1), path)
        return [*command, place.run.uri]

    return prepare


def extend_over(pattern: str) -> Callable[[Place], Sequence[object]]:
    """Goes on with a run whose tip has lost a file."""

    def prepare(place: Place) -> Sequence[object]:
        place.in_tip(pattern).unlink()
        return place.again(run__total_steps=6)

    return prepare


def extend_a_truncated_run(place: Place) -> Sequence[object]:
    os.truncate(place.in_tip("segments/*/rollouts-*.parquet"), 1000)
    return place.again(run__total_steps=6)


def replay_an_edited_guide(place: Place) -> Sequence[object]:
    edited("guides/*/trajectories-*.parquet")(place)
    return ["stage", "replay", place.run.uri, "--guide", place.run.guides()[0].guide_id]


def foreign_guide(field: str, value: str) -> Callable[[Place], Sequence[object]]:
    """Commits the run's guide once more, as one that was made on other terms."""

    def prepare(place: Place) -> Sequence[object]:
        run = place.run
        guide = run.guides()[0]
        table = run.table(guide, "trajectories")
        other = run.commit_guide(guide.spec.model_copy(update={field: value}), table, guide.tokens_guide, {})
        return ["stage", "replay", run.uri, "--guide", other.guide_id]

    return prepare


def lost_checkpoint(place: Place) -> Sequence[object]:
    shutil.rmtree(place.in_tip("checkpoints/000004"))
    return ["verify", "--json", place.run.uri]


def stage(name: str, *options: object) -> Callable[[Place], Sequence[object]]:
    return lambda place: ["stage", name, place.run.uri, *options]


def view(name: str, *options: object) -> Callable[[Place], Sequence[object]]:
    return lambda place: [name, place.run.uri, *options]


def unknown_run(name: str, *options: object) -> Callable[[Place], Sequence[object]]:
    return lambda place: [name, f"{place.store}/nobody", *options]


def model(change: Callable[[Path], None]) -> Callable[[Place], Sequence[object]]:
    """A run from a changed copy of the embedded model."""

    def prepare(place: Place) -> Sequence[object]:
        folder = place.folder / "model"
        shutil.copytree(testbed.model_dir(), folder)
        change(folder)
        return train(place.store, "new", model__path=folder)

    return prepare


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def nan_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "norm" in name)
    save_file({**tensors, name: tensors[name] * float("nan")}, path, {"format": "pt"})


def new_run(**overrides: object) -> Callable[[Place], Sequence[object]]:
    return lambda place: train(place.store, "new", **overrides)


def start_from(source: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: train(place.store, "new", model__start_from=f"{place.store}/{source}")


def export_over(place: Place) -> Sequence[object]:
    return ["export", place.run.uri, "--to", place.store]


def same_command(place: Place) -> Sequence[object]:
    return place.again()


def spoiled_record(place: Place) -> Sequence[object]:
    path = place.store / "demo" / "run.json"
    path.write_text(path.read_text().replace('"learning_rate"', '"learning_speed"'))
    return ["stage", "main", place.run.uri, "--stop", "6"]


OFFLINE = (("HF_HUB_OFFLINE", "1"),)
NO_SERVER = (("PREFECT_API_URL", "http://127.0.0.1:9/api"),)
CASES: dict[str, Case] = {
    "store below a file": Case(below_a_file, 1, ("/file/store/new|/file/store/demo", "run.store")),
    "store of a protocol without support": Case(unsupported_protocol, 2, ("run.store", "'ftp'", "file://")),
    "another recipe": Case(
        changed_recipe,
        2,
        (r"learning_rate was \S+, is 0.003", "group_size was 8, is 4", "another run.name"),
    ),
    "inspect a truncated segment": Case(
        truncated("legs/*/segments/*/rollouts-*.parquet", "inspect", "--limit", "1000"),
        1,
        (r"rollouts-\w+\.parquet has \d+ bytes", "restore"),
    ),
    "inspect an edited segment": Case(
        edited("legs/*/segments/*/rollouts-*.parquet", "inspect", "--limit", "1000"),
        1,
        (r"rollouts-\w+\.parquet", "restore"),
    ),
    "metrics of a truncated segment": Case(
        truncated("legs/*/segments/*/metrics-*.parquet", "metrics"),
        1,
        (r"metrics-\w+\.parquet has \d+ bytes", "restore"),
    ),
    "metrics of an edited segment": Case(
        edited("legs/*/segments/*/metrics-*.parquet", "metrics"), 1, (r"metrics-\w+\.parquet", "restore")
    ),
    "extend a run with a truncated segment": Case(
        extend_a_truncated_run, 1, (r"rollouts-\w+\.parquet has 1000 bytes", "restore")
    ),
    "replay an edited guide": Case(replay_an_edited_guide, 1, (r"trajectories-\w+\.parquet", "restore")),
    "a guide of another tokenizer": Case(
        foreign_guide("tokenizer_digest", "0" * 64),
        1,
        ("another tokenizer or chat template", "000000", "make the guide"),
    ),
    "a guide of another verifier": Case(
        foreign_guide("verifier", "other/9"), 1, ("another verifier", "other/9", "make the guide again")
    ),
    "a lost checkpoint manifest": Case(
        extend_over("checkpoints/000004/manifest.json"), 1, ("no checkpoint at step 4", "restore it", "npo verify")
    ),
    "lost checkpoint weights": Case(
        extend_over("checkpoints/000004/model-*"), 1, (r"000004/model-\w+\.safetensors is missing", "restore")
    ),
    "an unreadable run record": Case(spoiled_record, 1, (r"run\.json", "learning_speed", "restore")),
    "show an unknown run": Case(unknown_run("show"), 1, ("no run 'nobody'", "runs there: demo")),
    "inspect an unknown run": Case(unknown_run("inspect"), 1, ("no run 'nobody'", "runs there: demo")),
    "verify an unknown run": Case(unknown_run("verify"), 1, ("no run 'nobody'", "runs there: demo")),
    "show no run": Case(lambda _: ["show", "demo"], 2, ("'demo' names no run", "STORE/RUN")),
    "inspect an unknown source": Case(view("inspect", "--source", "x"), 2, ("--source 'x'", "policy nor guide")),
    "export over files": Case(export_over, 2, ("is not empty", "new directory")),
    "export an unknown step": Case(view("export", "--to", "none", "--step", 3), 1, ("step 3", "its steps: 0, 2, 4")),
    "guide of an unknown leg": Case(
        stage("guide", "--leg", "nobody", "--step", 2, "--start", 0, "--stop", 2), 1, ("nobody", "choose one")
    ),
    "scout from an unknown step": Case(
        stage("scout", "--start", 3, "--lookahead", 2), 1, ("no checkpoint at step 3", "its steps: 0, 2, 4")
    ),
    "replay an unknown guide": Case(stage("replay", "--guide", "nobody"), 1, ("no guide nobody", "it has: ")),
    "a model of pickles": Case(model(only_pickles), 2, ("model.path", "no .safetensors file", "save_pretrained")),
    "a model without tokenizer": Case(model(no_tokenizer), 2, ("model.path", "tokenizer", "give a complete")),
    "a truncated model": Case(model(half_the_weights), 2, ("model.path", "weights cannot be used")),
    "a model that is not there": Case(
        new_run(model__path="nobody/nothing"), 2, ("model.path 'nobody/nothing'", "check the spelling"), OFFLINE
    ),
    "a model that the hub does not give": Case(
        new_run(model__path="nobody/nothing-9a8b7c"), 2, ("model.path 'nobody/nothing-9a8b7c'", "check the spelling")
    ),
    "start from an unknown run": Case(start_from("nobody"), 2, ("model.start_from", "no run 'nobody'", "there: demo")),
    "start from an unknown step": Case(start_from("demo@77"), 2, ("model.start_from", "step 77", "its steps: 0, 2, 4")),
    "weights that are NaN": Case(model(nan_weights), 1, ("step 0", "not finite", "checkpoint")),
    "a Prefect server that is not there": Case(
        same_command, 1, ("PREFECT_API_URL http://127.0.0.1:9/api", "start that server, or unset"), NO_SERVER, 30
    ),
}


DAMAGES: dict[str, Case] = {
    "a truncated segment": Case(
        truncated("legs/*/segments/*/rollouts-*.parquet", "verify", "--json"), 1, (r"segments/.*rollouts-", "bytes")
    ),
    "an edited guide": Case(
        edited("guides/*/trajectories-*.parquet", "verify", "--json"), 1, (r"guides/.*trajectories-", "bytes")
    ),
    "a lost checkpoint": Case(lost_checkpoint, 1, (r"segments/.*manifest", "step 4.* is missing")),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_server: dict[str, str]) -> Path:
    """The store of a finished NPO run that nobody damages."""
    store = tmp_path_factory.mktemp("finished") / "store"
    last_json(npo(*train(store), "--json", env=prefect_server))
    return store


@dataclass(frozen=True)
class Outcome:
    """What a case left."""

    result: subprocess.CompletedProcess[str]
    seconds: float
    before: dict[str, str]
    after: dict[str, str]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    finished: Path,
    prefect_server: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Outcome]]]:
    """Every case that was asked for, a few at a time."""

    def happen(name: str) -> Outcome:
        case, place = {**CASES, **DAMAGES}[name], Place(tmp_path_factory.mktemp("case"))
        shutil.copytree(finished, place.store)
        arguments = case.prepare(place)
        before, began = files(place.store), time.monotonic()
        result = npo(*arguments, env={**prefect_server, **dict(case.environment)})
        return Outcome(result, time.monotonic() - began, before, files(place.store))

    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(happen, name) for name in (*CASES, *DAMAGES) if name in asked}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_one_message_and_nothing_committed_is_lost(
    name: str, outcomes: dict[str, Future[Outcome]]
) -> None:
    case, outcome = CASES[name], outcomes[name].result()
    assert_refused(outcome.result, case.code, *case.said)
    assert outcome.before.items() <= outcome.after.items()
    assert outcome.seconds < case.seconds


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_names_the_damaged_file_and_a_remedy(name: str, outcomes: dict[str, Future[Outcome]]) -> None:
    case, result = DAMAGES[name], outcomes[name].result().result
    assert result.returncode == case.code, result.stderr
    assert "Traceback" not in result.stderr
    faults = json.loads(result.stdout.splitlines()[-1])["faults"]
    key, problem = case.said
    assert any(re.search(key, fault["key"]) and re.search(problem, fault["problem"]) for fault in faults), faults
    assert all("restore it from a copy" in fault["remedy"] for fault in faults)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["runn"],
        ["run", "deploy/configs/testbed-grpo.yaml", "-s"],
        ["inspect", "runs/demo", "--step", "-1"],
        ["stage", "scout", "runs/demo", "--start", "0"],
        ["run", "deploy/configs/none.yaml"],
        ["run", "pyproject.toml"],
        ["run", "deploy/configs/testbed-grpo.yaml", "-s", "lerner.eps=1"],
        ["run", "deploy/configs/testbed-grpo.yaml", "-s", "learner.eps=small"],
        ["run", "deploy/configs/testbed-grpo.yaml", "-s", "learner.eps=-1"],
        ["run", "deploy/configs/testbed-grpo.yaml", "-s", "algorithm.method=ppo"],
    ],
    ids=" ".join,
)
def test_bad_usage_ends_with_2(arguments: list[str]) -> None:
    result = npo(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stdout + result.stderr
    assert "rror" in result.stderr
    assert result.stdout == ""


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that a run does not fit into."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs privileges here; the limit on file sizes is tested anyway")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_a_run_and_the_same_command_finishes_it(
    small_disk: Path, finished: Path, prefect_server: dict[str, str]
) -> None:
    stopped = npo(*train(small_disk), env=prefect_server)
    assert_refused(stopped, 1, "No space left on device", "free some space and run again", "nothing .* is lost")
    run = open_run(f"file://{small_disk}/demo")
    assert run.checkpoints(run.legs()[0].leg_id), "it stopped before it did anything"
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert last_json(npo(*train(small_disk), "--json", env=prefect_server))["head_step"] == 4
    assert fingerprint(run) == fingerprint(open_run(f"file://{finished}/demo"))


def test_a_store_on_a_read_only_disk_is_named(small_disk: Path, prefect_server: dict[str, str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_refused(npo(*train(small_disk), env=prefect_server), 1, str(small_disk), "Read-only", "another run.store")


def test_a_limit_on_file_sizes_stops_a_run_and_without_it_the_run_ends_the_same(
    tmp_path: Path, finished: Path, prefect_server: dict[str, str]
) -> None:
    shutil.copytree(finished, tmp_path / "store")
    arguments = train(tmp_path / "store", run__total_steps=6)
    blocks = 2000  # of 1 KiB: the weights of a checkpoint fit, its optimizer does not
    command = f'ulimit -f {blocks}; exec "$0" -m flows.cli "$@"'
    stopped = subprocess.run(
        ["bash", "-c", command, sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **prefect_server},
        capture_output=True,
        text=True,
    )
    assert_refused(stopped, 1, "File too large|os error 27", "free s", "run again", "nothing .* is lost")
    assert files(finished).items() <= files(tmp_path / "store").items()
    assert npo("verify", f"{tmp_path}/store/demo").returncode == 0


# ---- signals


def running(arguments: Sequence[str], folder: Path, store: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run with its own Prefect server, in the middle of its work, and every process that it started."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=ROOT,
        env={**environment, "PREFECT_HOME": str(folder / "prefect"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(store.glob("demo/legs/*/segments/*/manifest.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("prefect" in " ".join(child.cmdline()) for child in started)
    return process, started


def test_ctrl_c_says_that_the_same_command_resumes_and_leaves_no_process(tmp_path: Path) -> None:
    process, started = running(train(tmp_path / "store", run__total_steps=1000), tmp_path, tmp_path / "store")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole process group
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stdout + stderr
    assert stderr.splitlines()[-1] == "npo: error: interrupted; the same command resumes it"
    _, left = psutil.wait_procs(started, timeout=10)
    assert not left
    assert npo("verify", f"{tmp_path}/store/demo").returncode == 0


def test_a_killed_run_leaves_no_server(tmp_path: Path) -> None:
    process, started = running(train(tmp_path / "store", run__total_steps=1000), tmp_path, tmp_path / "store")
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(started, timeout=10)
    assert not left
