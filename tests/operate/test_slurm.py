"""The Slurm engine as far as it can be told without a Slurm; tests/e2e/slurm has a real one."""

import asyncio
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.errors import ConfigError
from balancer.operate.engines.slurm import cluster, engine, room
from balancer.operate.engines.slurm.batch import PORT_MARK, batch, excluding
from balancer.operate.engines.slurm.cluster import Mark, Node, Silent, seconds
from balancer.operate.engines.slurm.engine import SlurmEngine
from balancer.operate.recipe.recipe import Recipe, recipe
from balancer.operate.state.service_folder import ServiceFolder
from balancer.spec.schema import Slurm
from balancer.spec.service_file import parse
from replica import announce
from tests.support.until import until

MARK = Mark("0f3a", 3, 2, "d1935", "a1b2")
SGLANG = "python -m sglang.launch_server --model-path /models/some"


def made(slurm: str = "{}", more: str = "", run: str = SGLANG, replicas: int = 1) -> Recipe:
    text = f"service: {{replicas: {replicas}}}\nx-groundserve:\n  slurm: {slurm}\n{more}\nrun: {run}\n"
    return recipe(parse(text, source="x.yaml"))


def flags(slurm: str, more: str, folder: Path) -> list[str]:
    return list(batch(made(slurm, more), MARK, folder / "jobs" / "a1b2.json", folder / "log", {}).flags)


def refusal(slurm: str) -> str:
    with pytest.raises(ConfigError) as raised:
        made(slurm)
    return str(raised.value)


def test_a_comment_is_read_as_it_was_written() -> None:
    """Also with the address, which the replica adds; the comments of others are none of ours."""
    assert Mark.of_text(MARK.text) == MARK
    assert Mark.of_text(f"{MARK.text},at=http://10.0.0.1:20001") == Mark(
        "0f3a", 3, 2, "d1935", "a1b2", "http://10.0.0.1:20001"
    )
    for other in (
        "",
        "(null)",
        "my job",
        "groundserve",
        "groundserve,of=1,id=x,version=1,digest=,start=",
        "a,of=1,id=1",
    ):
        assert Mark.of_text(other) is None, other


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:05", 5),
        ("2:00", 120),
        ("1:00:00", 3600),
        ("2-03:04:05", 183845),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_slurms_times_in_seconds(text: str, expected: float | None) -> None:
    assert seconds(text) == expected


def test_a_job_asks_for_what_the_file_says(tmp_path: Path) -> None:
    slurm = "{partition: gpu, account: nlp, qos: high, time: '2-00:00:00', exclude: 'h1,h[3-5]'}"
    said = flags(slurm, "resources: {accelerators: A100:2, cpus: 3.5, memory: 16}", tmp_path)
    assert [flag for flag in said if flag.startswith("--output")] == [f"--output={tmp_path}/log"]
    for flag in (
        "partition=gpu",
        "account=nlp",
        "qos=high",
        "time=2-00:00:00",
        "gres=gpu:2",
        "cpus-per-task=4",
        "mem=16384M",
    ):
        assert f"--{flag}" in said
    assert excluding(Slurm(exclude="h1"), ["h7"]) == ["--exclude=h1,h7"]
    assert excluding(None, []) == []
    assert "--gres=gpu:a100:1" in flags("{gres: 'gpu:a100:1'}", "resources: {accelerators: A100:1}", tmp_path)


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ("{time: 90}", "slurm.time should be text as sbatch takes it, in quotes"),
        ("{time: 12:00:00}", "slurm.time should be text as sbatch takes it, in quotes"),
        ("{time: soon}", "slurm.time should be text as sbatch takes it, in quotes"),
        ("{partition: '--wrap=id'}", "slurm.partition should be one word as sbatch takes it"),
        ("{exclude: 'h1 h2'}", "slurm.exclude should be one word as sbatch takes it"),
        ("{local_models: scratch}", "slurm.local_models should be a whole path"),
        ('{container: "apptainer \'exec"}', "slurm.container should be the beginning of a command"),
        ("{partitoin: gpu}", "slurm.partitoin is unknown; the nearest known key is 'partition'"),
    ],
)
def test_a_bad_block_is_refused_with_its_key(slurm: str, expected: str) -> None:
    assert expected in refusal(slurm)


def test_secrets_are_in_a_file_of_the_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the batch script nor in sbatch's flags; and no GPU of our own session goes along."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    ours = made(more="secrets: {HF_TOKEN: sesame}\nresources: {accelerators: L4}")
    job = batch(ours, MARK, tmp_path / "jobs" / "a1b2.json", tmp_path / "log", {"SGLANG_API_KEY_FILE": "/k"})
    assert "sesame" not in job.script + " ".join(job.flags) + MARK.text
    assert stat.S_IMODE(job.file.stat().st_mode) == 0o600
    said = json.loads(job.file.read_text())
    assert (said["envs"]["HF_TOKEN"], said["envs"]["SGLANG_API_KEY_FILE"]) == ("sesame", "/k")
    assert not {"CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"} & said["envs"].keys()
    assert said["argv"][said["argv"].index("--port") + 1] == PORT_MARK


def test_a_percent_sign_in_a_path_means_itself(tmp_path: Path) -> None:
    """In the name of a job's log, sbatch puts something in the place of others."""
    (tmp_path / "100%j").mkdir()
    assert f"--output={tmp_path}/100%%j/log" in flags("{}", "", tmp_path / "100%j")


def test_replicas_without_a_gpu_see_none(tmp_path: Path) -> None:
    """Their node may have some, which are others'."""
    job = batch(made(), MARK, tmp_path / "jobs" / "a.json", tmp_path / "log", {})
    assert json.loads(job.file.read_text())["envs"]["CUDA_VISIBLE_DEVICES"] == ""
    assert not [flag for flag in job.flags if "gres" in flag]


SQUEUE = """\
#!/bin/sh
[ "$(basename "$0")" = squeue ] && exec cat {here}/queue
echo "$*" >>{here}/cancelled
! [ -e {here}/deaf ] || {{ echo "scancel: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
"""


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SlurmEngine]:
    """The engine of a service, for jobs in the queue: each its number, its replica and its start."""
    for program in ("squeue", "scancel"):
        (tmp_path / program).write_text(SQUEUE.format(here=tmp_path))
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = ServiceFolder(tmp_path / "state", "x")
    folder.path.mkdir(parents=True)
    monkeypatch.setattr(engine, "_LOOK", 0.05)

    def made(*jobs: tuple[int, int, str]) -> SlurmEngine:
        of = engine._of(folder)
        comments = [(job, replace(MARK, of=of, id=id, start=start).text) for job, id, start in jobs]
        lines = [f"{job}|RUNNING|None|h1|gpu|1:00:00|0:10|{comment}\n" for job, comment in comments]
        (tmp_path / "queue").write_text("".join(lines))
        return SlurmEngine(folder)

    return made


def cancelled(folder: Path) -> list[str]:
    there = folder / "cancelled"
    return there.read_text().splitlines() if there.exists() else []


def test_finding_out_again_cancels_no_job_that_is_ours(queued: Callable[..., SlurmEngine], tmp_path: Path) -> None:
    async def run() -> None:
        made = queued((4, 1, "a"), (5, 2, "b"), (6, 2, "c"))
        (tmp_path / "deaf").touch()
        with pytest.raises(Silent):
            await made.found()
        (tmp_path / "deaf").unlink()
        assert [survivor.id for survivor in await made.found()] == [1, 2]
        await stopped(made)

    asyncio.run(run())
    assert set(cancelled(tmp_path)) == {"5"}


def test_the_log_of_a_job_goes_on_under_its_name(queued: Callable[..., SlurmEngine], tmp_path: Path) -> None:
    """Slurm's daemon has it open while one controller follows another, and each sets aside what logs there are."""
    folder = ServiceFolder(tmp_path / "state", "x")
    log = folder.replica_log(1)

    async def run() -> None:
        with log.open("a") as writer:
            for number in (1, 2, 3):
                print(f"line {number}", file=writer, flush=True)
                folder.claim().close()
                made = queued((4, 1, "a"))
                await made.found()
                await stopped(made)

    asyncio.run(run())
    assert log.read_text() == "line 1\nline 2\nline 3\n"


def test_a_job_that_was_submitted_twice_runs_once(queued: Callable[..., SlurmEngine], tmp_path: Path) -> None:
    """sbatch was silent, and was heard after the next one had been."""

    async def run() -> None:
        made = queued((4, 1, "a"))
        await made.found()
        queued((4, 1, "a"), (5, 1, "a"))
        await until(lambda: cancelled(tmp_path))
        await stopped(made)

    asyncio.run(run())
    assert set(cancelled(tmp_path)) == {"5"}


async def stopped(made: SlurmEngine) -> None:
    """Ends its look at the queue, and leaves its jobs."""
    assert made._watching is not None
    made._watching.cancel()
    await asyncio.gather(made._watching, return_exceptions=True)


def test_both_programs_mean_the_same_port_mark() -> None:
    assert PORT_MARK == announce.PORT_MARK


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:2", {"": 2}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:2(S:0),gpu:t4:1(S:1)", {"a100": 2, "t4": 1}),
        ("gpu:a100:1(IDX:0)", {"a100": 1}),
        ("gpu:(null):0(IDX:N/A)", {}),
        ("(null)", {}),
        ("license:3,gpu:2", {"": 2}),
    ],
)
def test_gpus_of_a_node(gres: str, expected: dict[str, int]) -> None:
    assert cluster._gpus(gres) == expected


def node(name: str, gpus: dict[str, int], partition: str = "gpu", state: str = "idle") -> Node:
    return Node(name, partition, partition == "gpu", state, gpus, 0)


def fitted(there: list[Node], ours: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[Recipe, list[str]]:
    monkeypatch.setattr(room, "nodes", lambda: there)
    monkeypatch.setattr(room, "answered", lambda *_: "")
    monkeypatch.setattr(room.capacity, "check_model", lambda _: None)
    return room.fit(ours)


def test_the_kind_of_gpu_in_slurms_words(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [node("h1", {"t4": 8}), node("h2", {"nvidia_a100_80gb": 4}), node("h3", {"": 9}, partition="old")]
    asks, warnings = fitted(there, made(more="resources: {accelerators: A100:2}"), monkeypatch)
    assert asks.spec.operation.slurm is not None
    assert (asks.spec.operation.slurm.gres, asks.fits, asks.resources) == ("gpu:nvidia_a100_80gb:2", 2, "2x A100")
    assert warnings == []
    asks, warnings = fitted(there, made(more="resources: {accelerators: H100}"), monkeypatch)
    assert asks.spec.operation.slurm is not None
    assert (asks.spec.operation.slurm.gres, asks.fits) == ("gpu:1", 12)
    assert "no GPU here is called H100: any is taken" in warnings[0]


def test_what_can_never_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [node("h1", {"": 2}), node("h2", {"": 3}, state="down*"), node("c1", {}, partition="cpu")]
    with pytest.raises(ConfigError, match=r"3 replicas of x want 2 GPUs each \(L4\); partition gpu has room for 2"):
        fitted(there, made(more="resources: {accelerators: L4:2}", replicas=3), monkeypatch)
    with pytest.raises(ConfigError, match="there is no partition tpu; there is cpu, gpu"):
        fitted(there, made("{partition: tpu}"), monkeypatch)
    with pytest.raises(ConfigError, match="Slurm gives a GPU to one job"):
        fitted(
            there,
            recipe(parse(f"service: {{}}\nx-groundserve: {{gpu_share: true}}\nrun: {SGLANG}\n", source="x.yaml")),
            monkeypatch,
        )


def test_without_slurm_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="there is no sbatch on the PATH"):
        room.fit(made())
