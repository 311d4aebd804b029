"""The Slurm engine as far as it can be told without a Slurm; tests/e2e/slurm has a real one."""

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from balancer.contract.words import State
from balancer.errors import ConfigError
from balancer.operate.engines.engine import CannotStart
from balancer.operate.engines.local.front import Front
from balancer.operate.engines.slurm import cluster, engine, room
from balancer.operate.engines.slurm.batch import (
    MEETING_MARK,
    PORT_MARK,
    RANK_MARK,
    Place,
    batch,
    excluding,
    places,
    surroundings,
)
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


def test_a_replica_on_several_nodes_is_one_job(tmp_path: Path) -> None:
    """SGLang gets its own flags for that; a script gets SkyPilot's variables."""
    more = "num_nodes: 2\nresources: {accelerators: A100:8, cpus: 16}"
    job = batch(made("{}", more), MARK, tmp_path / "jobs" / "a.json", tmp_path / "log", {})
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--gres=gpu:8"} <= set(job.flags)
    step = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=16 env PYTHONPATH="
    assert job.script.startswith(f"#!/bin/sh\nexec {step}")
    said = json.loads(job.file.read_text())
    flags = ["--nnodes", "2", "--node-rank", RANK_MARK, "--dist-init-addr", MEETING_MARK, "--tp-size", "16"]
    assert (said["nodes"], said["argv"][-9:]) == (2, ["--", *flags])
    assert said["envs"]["SKYPILOT_NUM_NODES"] == "2"
    assert made(more="num_nodes: 2\nresources: {accelerators: A100:8}", run=f"{SGLANG} --tp 4").gpus == 2
    with pytest.raises(ConfigError, match="3 GPUs, which cannot be spread evenly over 2"):
        made(more="num_nodes: 2\nresources: {accelerators: A100:8}", run=f"{SGLANG} --tp 3")
    pipelined = batch(
        made("{}", more, f"{SGLANG} --tp 8 --pp 2"), MARK, tmp_path / "jobs" / "b.json", tmp_path / "log", {}
    )
    assert json.loads(pipelined.file.read_text())["argv"][-6:-4] == ["--nnodes", "2"]


def test_the_nodes_of_a_replica_wait_for_each_other(tmp_path: Path) -> None:
    """And the first one's address is where they meet."""
    ours = made("{}", "num_nodes: 2\nresources: {accelerators: A100:8}")
    job = batch(ours, MARK, tmp_path / "jobs" / "a.json", tmp_path / "log", {})
    came: list[str] = []

    def first_comes(_: float) -> None:
        if not came:
            came.append("first")
            announce.meet(job.file, 0, 1, {"node": "h1", "address": "10.0.0.1", "port": 1, "meeting": "10.0.0.1:9"})

    here = {"node": "h2", "address": "10.0.0.2", "port": 2, "meeting": "10.0.0.2:9"}
    both = announce.meet(job.file, 1, 2, here, first_comes)
    assert [one["address"] for one in both] == ["10.0.0.1", "10.0.0.2"]
    assert stat.S_IMODE(job.file.with_name("a.json.1").stat().st_mode) == 0o600
    assert places(job.file) == [Place("h1", "10.0.0.1", 1), Place("h2", "10.0.0.2", 2)]
    read = announce.Job.read(job.file)
    mine = announce._together(read, job.file, 1, "127.0.0.1", 20001, {"SLURMD_NODENAME": "h2"})
    assert mine.argv[-6:-2] == ("--node-rank", "1", "--dist-init-addr", "10.0.0.1:9")
    assert mine.envs["SKYPILOT_NODE_IPS"] == "10.0.0.1\n127.0.0.1"
    assert mine.envs["SKYPILOT_NODE_RANK"] == "1"
    job.remove()
    assert list(job.file.parent.iterdir()) == []


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
[ "$(basename "$0")" = squeue ] && {{ echo "$*" >{here}/asked; exec cat {here}/queue; }}
[ "$(basename "$0")" = sinfo ] && {{ [ -e {here}/nodes ] && cat {here}/nodes; exit 0; }}
[ "$(basename "$0")" = sbatch ] && {{ echo "$*" >>{here}/submitted; exec {here}/refuses "$*"; }}
echo "$*" >>{here}/cancelled
! [ -e {here}/deaf ] || {{ echo "scancel: error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }}
"""


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SlurmEngine]:
    """The engine of a service, for jobs in the queue: each its number, its replica and its start."""
    for program in ("squeue", "scancel", "sinfo", "sbatch"):
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


@pytest.mark.parametrize("is_queued", [False, True])
def test_a_download_goes_on_under_the_next_controller(
    queued: Callable[..., SlurmEngine], tmp_path: Path, is_queued: bool
) -> None:
    """Also that of a job which only begins then; what an earlier one left in the log is none of its words."""
    folder = ServiceFolder(tmp_path / "state", "x")
    said = "fetching some/model: 12 GB of 140 GB"
    folder.replica_log(1).write_text("loading\n" if is_queued else f"replica: {said}\n")

    async def run() -> None:
        made = queued((4, 1, "a"))
        running = (tmp_path / "queue").read_text()
        if is_queued:
            (tmp_path / "queue").write_text(running.replace("RUNNING", "PENDING"))
        await made.found()
        if is_queued:
            with folder.replica_log(1).open("a") as out:
                out.write(f"replica: {said}\n")
            (tmp_path / "queue").write_text(running)
        listing = await until(lambda: (one := made.running()[1]).reason == said and one)
        assert listing.state is State.FETCHING
        await stopped(made)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("state", "blameless", "counts"),
    [("PREEMPTED", True, False), ("NODE_FAIL", True, False), ("TIMEOUT", True, True), ("FAILED", False, False)],
)
def test_whose_fault_the_end_of_a_job_is(
    queued: Callable[..., SlurmEngine], tmp_path: Path, state: str, blameless: bool, counts: bool
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho JobId=4 JobState={state} ExitCode=1:0 TimeLimit=00:10:00\n")
    (tmp_path / "scontrol").chmod(0o755)

    async def run() -> None:
        made = queued((4, 1, "a"))
        await made.found()
        queued()
        (over,) = await until(made.ended)
        assert (over.is_blameless, over.counts_if_never_ready) == (blameless, counts)
        await stopped(made)

    asyncio.run(run())


def test_who_has_to_move_from_a_node_is_told(queued: Callable[..., SlurmEngine], tmp_path: Path) -> None:
    """Also by the first look of a controller, which else would take the successors for one too many."""
    (tmp_path / "nodes").write_text("h1|draining|disk | cable, soon\nh7|fail|none\n")

    async def run() -> None:
        made = queued((4, 1, "a"))
        await made.found()
        listing = made.running()[1]
        assert listing.has_to_move
        assert listing.reason == "Slurm says that h1 is draining: disk | cable, soon"
        await stopped(made)

    asyncio.run(run())


def test_what_was_lost_first_is_avoided_no_longer(queued: Callable[..., SlurmEngine], tmp_path: Path) -> None:
    """Where Slurm has too few nodes without all that were lost."""
    refuses = """case "$1" in *h9,h1*) echo "sbatch: error: too few nodes" >&2; exit 1;; esac; echo 17"""
    (tmp_path / "refuses").write_text(f"#!/bin/sh\n{refuses}\n")
    (tmp_path / "refuses").chmod(0o755)

    async def run() -> None:
        made = queued()
        now = asyncio.get_running_loop().time()
        made._nodes._shunned = {"h1": now + 500, "h2": now - 1, "h9": now + 400}
        await made.start(1, made_recipe)
        assert (made._replicas[1].job_id, made._replicas[1].avoids) == ("17", {"h1"})

    made_recipe = made()
    asyncio.run(run())
    excluded = [line.split()[-1] for line in (tmp_path / "submitted").read_text().splitlines()]
    assert excluded == ["--exclude=h9,h1", "--exclude=h1"]


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


def test_a_job_that_could_not_be_cancelled_is_cancelled_later(
    queued: Callable[..., SlurmEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that Slurm was told to end and did not: its node may have been away."""

    async def run() -> None:
        made = queued((4, 1, "a"))
        await made.found()
        (tmp_path / "deaf").touch()
        queued((4, 1, "a"), (5, 1, "a"))
        await until(lambda: len(cancelled(tmp_path)) >= 2)
        (tmp_path / "deaf").unlink()
        tried = len(cancelled(tmp_path))
        await until(lambda: len(cancelled(tmp_path)) > tried)
        monkeypatch.setattr(engine, "_UNTIL_GONE", 0.0)
        tried = len(cancelled(tmp_path))
        await until(lambda: len(cancelled(tmp_path)) > tried)
        await stopped(made)

    asyncio.run(run())
    assert set(cancelled(tmp_path)) == {"5"}


@pytest.mark.parametrize(
    ("said", "is_over"),
    [
        ("Kill job error on job id 5: Invalid job id specified", True),
        ("Kill job error on job id 5: Job/step already completing or completed", True),
        ("Kill job error on job id 5: Access/permission denied", False),
    ],
)
def test_what_scancel_refuses_is_not_taken_for_done(
    queued: Callable[..., SlurmEngine], tmp_path: Path, said: str, is_over: bool
) -> None:
    made = queued()
    (tmp_path / "scancel").write_text(f"#!/bin/sh\necho 'scancel: error: {said}' >&2\nexit 1\n")
    with contextlib.nullcontext() if is_over else pytest.raises(CannotStart, match="denied"):
        asyncio.run(made._cluster.cancel("5"))


def test_the_reason_of_an_end_is_not_what_srun_says_after_it() -> None:
    after = ["srun: launch/slurm: _step_signal: Terminating StepId=1.0", "srun: Force Terminated StepId=1.0", ""]
    assert engine.last_words(["ready", "srun: error: h2: task 1: Killed", *after]) == "srun: error: h2: task 1: Killed"
    after_of_24_11 = ["srun: Terminating StepId=1.0", "slurmstepd-h1: error: *** STEP 1.0 ON h1 CANCELLED AT 1 ***"]
    assert engine.last_words(["ready", "srun: error: h2: task 1: Killed", *after_of_24_11]).endswith("Killed")
    exited = "srun: error: h2: task 1: Exited with exit code 1"
    assert engine.last_words(["replica: no such model", exited, *after]) == "replica: no such model"
    assert engine.last_words([]) == ""


def test_jobs_in_hidden_partitions_are_seen(queued: Callable[..., SlurmEngine], tmp_path: Path) -> None:
    assert asyncio.run(queued()._cluster.jobs()) == []
    assert "--all" in (tmp_path / "asked").read_text().split()


@pytest.mark.parametrize("variable", ["SBATCH_CLUSTERS", "SLURM_CLUSTERS"])
def test_all_commands_go_to_the_cluster_of_the_jobs(
    queued: Callable[..., SlurmEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """And no variable of the user's own narrows what they list or end."""
    made = queued()
    for program in ("sbatch", "squeue", "scancel", "scontrol", "sinfo"):
        (tmp_path / program).write_text(f"#!/bin/sh\nenv >{tmp_path}/environ.{program}\necho 17\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv(variable, "gpu")
    narrow = ("SQUEUE_PARTITION", "SQUEUE_STATES", "SINFO_PARTITION", "SCANCEL_INTERACTIVE", "SCONTROL_ALL")
    for name in narrow:
        monkeypatch.setenv(name, "1")

    async def run() -> None:
        assert await made._cluster.submit("#!/bin/sh\n", [], str(tmp_path)) == "17"
        await made._cluster.jobs()
        await made._cluster.cancel("17")
        await made._cluster.end_of("17")
        await made._cluster.nodes_to_empty()

    def environ(program: str) -> dict[str, str]:
        lines = (tmp_path / f"environ.{program}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    asyncio.run(run())
    for program in ("squeue", "scancel", "scontrol", "sinfo"):
        assert environ(program)["SLURM_CLUSTERS"] == "gpu", program
        assert not environ(program).keys() & set(narrow)
    job = environ("sbatch")
    assert job["SBATCH_CLUSTERS"] == "gpu"
    assert "SLURM_CLUSTERS" not in job, "the job's own scontrol would heed it"
    cluster.nodes()
    cluster.remove_jobs("groundserve-x", "0f3a")
    for program in ("squeue", "sinfo"):
        assert environ(program)["SLURM_CLUSTERS"] == "gpu", program
        assert not environ(program).keys() & set(narrow)


def test_sbatchs_own_cluster_goes_before_that_of_all() -> None:
    both = {"SBATCH_CLUSTERS": "gpu", "SLURM_CLUSTERS": "cpu", "PATH": "/bin"}
    assert cluster.environ_of_commands(both)["SLURM_CLUSTERS"] == "gpu"
    assert cluster.environ_of_jobs(both) == {"SBATCH_CLUSTERS": "gpu", "PATH": "/bin"}
    assert cluster.environ_of_commands({"PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize("variable", ["SBATCH_CLUSTERS", "SLURM_CLUSTERS"])
@pytest.mark.parametrize("several", ["gpu,cpu", "all"])
def test_several_clusters_are_refused(
    queued: Callable[..., SlurmEngine], variable: str, several: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = queued()
    monkeypatch.setenv(variable, several)
    with pytest.raises(ConfigError, match=f"{variable}={several}: all jobs of a service are on one cluster"):
        engine.fit(made())


def test_the_nodes_of_a_cluster_that_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name comes before them, with a line of its own."""
    row = "".join(f"{cell:<{width}}" for cell, width in [("gpu*", 64), ("h1", 64), ("idle", 48), ("gpu:2", 256)])
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\ncat <<END\nCLUSTER: north\n{row}{'':256}\n\nEND\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert cluster.nodes() == [Node("h1", "gpu", True, "idle", {"": 2}, 0)]


async def stopped(made: SlurmEngine) -> None:
    """Ends its look at the queue, and leaves its jobs."""
    assert made._watching is not None
    made._watching.cancel()
    await asyncio.gather(made._watching, return_exceptions=True)


def test_both_programs_mean_the_same_marks() -> None:
    ours = PORT_MARK, RANK_MARK, MEETING_MARK
    assert ours == (announce.PORT_MARK, announce.RANK_MARK, announce.MEETING_MARK)


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


@pytest.mark.parametrize(
    ("slurm", "more", "is_another"),
    [
        ("{partition: big}", "", True),
        ("{time: '1-0'}", "", True),
        ("{container: 'apptainer exec x.sif'}", "", True),
        ("{}", "resources: {memory: 64}", True),
        ("{}", "resources: {cpus: 8}", True),
        ("{}", "resources: {accelerators: A100}", True),
        ("{exclude: h1}", "", False),
    ],
)
def test_what_goes_into_a_job_makes_it_another(
    slurm: str, more: str, is_another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update to that replaces the replicas; which nodes are avoided matters to the next start only."""
    monkeypatch.setattr(room, "nodes", lambda: [node("h1", {"a100": 2}), node("h2", {}, "big")])
    monkeypatch.setattr(room, "answered", lambda *_: "")
    monkeypatch.setattr(room.capacity, "check_model", lambda _: None)
    monkeypatch.setattr(Front, "check_keys", lambda *_: None)
    engine = SlurmEngine(ServiceFolder(tmp_path, "x"))
    old, new = (engine.fit(one)[0] for one in (made(), made(slurm, more)))
    assert new.starts_like(old) is not is_another
    assert (new.digest != old.digest) is is_another


def test_a_key_that_no_file_has_yet_makes_no_other_job() -> None:
    """A later version that knows one more starts nobody anew."""

    class Later(Slurm):
        newer: str | None = None

    ours = made("{partition: big}")
    operation = ours.spec.operation.model_copy(update={"slurm": Later(partition="big")})
    later = replace(ours, spec=replace(ours.spec, operation=operation))
    assert surroundings(later) == surroundings(ours) != surroundings(made())


def test_each_part_of_a_replica_wants_a_node_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wants = made(more="num_nodes: 2\nresources: {accelerators: L4:2}")
    three = [node("h1", {"": 4}), node("h2", {"": 2}), node("h3", {"": 1})]
    asks, _ = fitted(three, wants, monkeypatch)
    assert (asks.fits, asks.resources) == (1, "2x (2x L4)")
    assert fitted([node("h1", {"": 40}), node("h2", {"": 5})], wants, monkeypatch)[0].fits == 2
    with pytest.raises(ConfigError, match=r"want 2 GPUs each \(L4\) on 2 nodes; partition gpu has room for 0"):
        fitted([three[0], three[2]], wants, monkeypatch)


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
