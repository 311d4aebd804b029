"""balancer/operate/recipe/memory_plan.py, and `groundserve check` with several files."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.errors import ConfigError
from balancer.operate.commands.begin import Source
from balancer.operate.commands.change import up_together
from balancer.operate.commands.division import divide
from balancer.operate.engines import capacity
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.local.engine import LocalEngine
from balancer.operate.engines.shared_memory import fractions
from balancer.operate.recipe.memory_plan import CONTEXT, LEAST_POOL, WORK, Share, plan, shown
from balancer.operate.recipe.recipe import Recipe, fraction, recipe, with_fraction
from balancer.operate.state.desired import Version
from balancer.operate.state.service_folder import ServiceFolder, state_root
from balancer.spec.service_file import load
from replica.gpu import list_gpus
from replica.lease import take
from replica.placement import Want
from tests.operate.command_line import Groundserve
from tests.operate.meant import desired

SEVEN = 13.5  # GiB of a 7B model in bfloat16


def test_three_on_a_card() -> None:
    """Three 7B models on 80 GiB: each has what the others' weights and contexts leave."""
    rows = plan(80, [Share(name, SEVEN, 512 << 10) for name in ("a", "b", "c")])
    assert [(round(row.pool, 1), row.fraction) for row in rows] == [(30.9, 0.555)] * 3
    assert rows[0].tokens == int(rows[0].pool * 2048)


def test_too_many() -> None:
    """Who comes after the card is full does not fit, with the numbers; the others are not made smaller for it."""
    rows = plan(80, [Share("a", 40), Share("b", 30), Share("c", 10), Share("small", 1.0)])
    assert [bool(row.problem) for row in rows] == [False, False, True, True]
    assert rows[2].problem == "it takes 13.0 GiB at the least, and 3.4 GiB are left beside a, b"
    assert rows[0].pool == rows[1].pool


def test_beside_one_that_is_up() -> None:
    """Who comes later gets what is left; but not where one that is up has more than would be left for its cache."""
    first, later = plan(80, [Share("a", 20, given=0.6), Share("b", 20)])
    assert (round(first.pool, 1), first.fraction) == (28.0, 0.6)
    assert (round(later.pool, 1), later.fraction) == (33.4, 0.667)
    first, later = plan(80, [Share("a", 20, given=0.9), Share("b", 20)])
    assert not first.problem
    assert later.problem == "33.4 GiB would be left for each KV cache, and a has 52.0"


def test_larger_than_the_card() -> None:
    """One that is larger than the card is told so alone."""
    assert plan(24, [Share("big", 30)])[0].problem == "it takes 33.0 GiB at the least, and 21.4 GiB are left"


def test_unknown_weights() -> None:
    """One whose weights are not here is told how they come here, and takes no room from the others."""
    rows = plan(80, [Share("a", None, model="org/a"), Share("b", SEVEN)])
    told = "nobody knows how large its weights are: groundserve pull org/a, or say --mem-fraction-static in its file"
    assert rows[0].problem == told
    assert rows[1].pool > 60
    assert shown("GPU 0", rows)[2:] == [
        "  a        ?         -         ?",
        "  b        13.5 GiB  61.9 GiB  0.942",
        f"a: {told}",
    ]


@given(st.integers(8, 192), st.lists(st.floats(0.1, 150), min_size=1, max_size=8))
def test_all_that_fits_fits_at_any_time(card: int, weights: list[float]) -> None:
    """Whoever has its turn: all weights and contexts, its pool, and room to compute are less than the card."""
    rows = plan(card, [Share(str(number), size) for number, size in enumerate(weights)])
    there = [row for row in rows if not row.problem]
    resident = sum(CONTEXT + (row.weights or 0) for row in there)
    for row in there:
        assert row.pool >= LEAST_POOL
        assert resident + row.pool + WORK <= card
        assert row.fraction * card <= (row.weights or 0) + row.pool


def test_shown() -> None:
    """A table, and a line for each that does not fit."""
    assert shown("GPU 0", plan(80, [Share("llava", SEVEN, 1 << 20), Share("huge", 90)])) == [
        "GPU 0, shared by turns:",
        "  SERVICE  WEIGHTS   KV CACHE                  --mem-fraction-static",
        "  llava    13.5 GiB  61.9 GiB (63,385 tokens)  0.942",
        "  huge     90.0 GiB  -                         does not fit",
        "huge: it takes 93.0 GiB at the least, and 61.9 GiB are left beside llava",
    ]


@pytest.fixture
def one_gpu(groundserve: Groundserve, tmp_path: Path) -> Groundserve:
    groundserve.environ |= {"REPLICA_PRETEND_GPUS": "1", "LEASE_DIR": str(tmp_path / "leases")}
    return groundserve


def model(folder: Path, gib: int) -> Path:
    """A folder whose headers tell of so many GiB of weights, in steps of two."""
    folder.mkdir()
    header = json.dumps({"a": {"dtype": "BF16", "shape": [gib // 2, 1 << 30], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text("{}")
    return folder


def test_up_passes_the_plan_on(one_gpu: Groundserve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says no fraction gets the one that check prints, also when its file is read again; who says one keeps it."""
    for name in ("REPLICA_PRETEND_GPUS", "LEASE_DIR"):
        monkeypatch.setenv(name, one_gpu.environ[name])
    run = f"sglang serve --model-path {model(tmp_path / 'model', 20)}"
    runs = {"a": f"{run} --mem-fraction-static 0.9", "b": run}
    files = {name: one_gpu.service(name, run, replicas=1, gpu_share=True) for name, run in runs.items()}
    made = {name: recipe(load(str(file))) for name, file in files.items()}
    assert fractions([capacity.fit(one)[0] for one in made.values()], ["a", "b"]) == ({"b": 0.667}, [])
    ServiceFolder(tmp_path, "b").write_planned_fraction(0.667)
    for name, share in (("a", 0.9), ("b", 0.667)):
        fitted, _ = LocalEngine(ServiceFolder(tmp_path, name)).fit(made[name])
        assert fraction(fitted) == share
        assert fitted.arguments(1)[-2:] == ("--mem-fraction-static", f"{share:g}")


class Shared:
    """Services a, b and c with 20 GiB of weights each, which share the one GPU of 80 GiB."""

    def __init__(self, groundserve: Groundserve, folder: Path) -> None:
        self.groundserve = groundserve
        self.run = f"sglang serve --model-path {folder}"
        self.files = {name: self.file(name) for name in "abc"}
        self.folders = {name: ServiceFolder(state_root(), name) for name in self.files}

    def file(self, name: str, more: str = "", run: str = "") -> Path:
        return self.groundserve.service(name, run or self.run, replicas=1, more=more, gpu_share=True)

    def made(self, name: str) -> Recipe:
        return recipe(load(str(self.files[name])))

    def meant(self, name: str, *, is_left: bool = False) -> None:
        """It is meant to exist, as its file says now."""
        self.folders[name].claim().close()
        file = Version(1, self.files[name].read_text(), str(self.files[name]), {}, ())
        self.folders[name].write_desired(desired(serving=1, versions=(file,), is_left=is_left))

    @contextlib.contextmanager
    def up(self, name: str) -> Iterator[None]:
        self.meant(name)
        with self.folders[name].claim() as lock:
            self.folders[name].sign(lock)
            yield

    def share(self, name: str) -> float | None:
        return self.folders[name].planned_fraction


@pytest.fixture
def shared(one_gpu: Groundserve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    for name in ("REPLICA_PRETEND_GPUS", "LEASE_DIR", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, one_gpu.environ[name])
    return Shared(one_gpu, model(tmp_path / "model", 20))


def planned(name: str, share: float) -> str:
    return f"{name}: --mem-fraction-static {share:g}, as planned for all that share its GPU"


def test_division(shared: Shared) -> None:
    """Who comes up beside others is planned with them; who is up keeps what it has, and gets a new share at its next
    start, by who is meant to be there then."""
    assert divide([shared.made("a")]) == [], "alone it says itself how much it takes"
    assert divide([shared.made("a"), shared.made("b")]) == [planned("a", 0.667), planned("b", 0.667)]
    shared.meant("b")
    with (
        shared.up("a"),
        pytest.raises(ConfigError, match=r"11\.4 GiB would .* a has 33\.4; groundserve down a, and bring it up tog"),
    ):
        divide([shared.made("c")])
    assert divide([shared.made("c")]) == [planned("c", 0.392)]
    shared.folders["b"].remove_desired()
    assert divide([shared.made("a")]) == [planned("a", 0.942)]
    assert (shared.share("a"), shared.share("b")) == (0.942, 0.667)


def test_who_serves_on_without_controller_keeps_its_share(shared: Shared) -> None:
    """Its replicas still have it, and go on with it when the next controller takes them up."""
    shared.folders["a"].write_planned_fraction(0.9)
    shared.meant("a", is_left=True)
    with pytest.raises(ConfigError, match=r"33\.4 GiB would be left for each KV cache, and a has 52\.0"):
        divide([shared.made("c")])
    assert divide([shared.made("a")]) == []
    assert shared.share("a") == 0.9


def test_up_of_several_divides_nothing_if_one_is_up(shared: Shared) -> None:
    shared.folders["a"].write_planned_fraction(0.9)
    both = [Source(str(shared.files[name])) for name in "ca"]
    with shared.up("a"), pytest.raises(ConfigError, match="a is up already: groundserve down a ends it"):
        up_together(both, AddressFlags(), "local", is_detached=True)
    assert (shared.share("a"), shared.share("c")) == (0.9, None)


def test_an_update_that_fails_leaves_the_share_in_force(shared: Shared) -> None:
    shared.meant("b")
    turn = take(list_gpus(os.environ), Want(1), Path(os.environ["LEASE_DIR"]), wait=0, note="other", is_shared=True)
    up = shared.groundserve.up(shared.files["a"], "--on", "local")
    up.until("a-1 waits for")  # its turn, so that it neither starts nor fails
    assert shared.share("a") == 0.667
    shared.folders["b"].remove_desired()
    said = shared.groundserve("update", "a", shared.file("a", run=f"{shared.run} --api-key x"), code=1)
    assert "now `run:` brings one of its own: take it down and up again" in said
    assert shared.share("a") == 0.667
    up.end(signal.SIGINT)
    turn.release()


def test_a_share_outlives_the_choice_of_a_kind(shared: Shared) -> None:
    """Of several kinds of GPUs the one that is here is taken, which changes nothing of the share."""
    shared.file("a", more="resources: {accelerators: {A100: 1, pretended: 1}}")
    fitted, _ = capacity.fit(with_fraction(shared.made("a"), 0.5))
    assert (fraction(fitted), dict(fitted.spec.accelerators)) == (0.5, {"pretended": 1})


def test_memory_in_use_is_no_reason_to_divide_nothing(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that runs has its memory already: neither an update of its service nor a newcomer wants it again."""
    monkeypatch.setattr(capacity.limits, "memory", lambda: 40e9)
    shared.file("a", more="resources: {memory: 48}")
    shared.folders["a"].write_planned_fraction(0.667)
    with shared.up("a"):
        assert divide([shared.made("c")]) == [planned("c", 0.667)]
        assert divide([shared.made("a")]) == [planned("a", 0.942)]


def test_a_broken_neighbour_keeps_nobody_down(shared: Shared, tmp_path: Path) -> None:
    """One that is meant to be there and could not come up is left out, and named; one that is up counts."""
    shared.file("a", more="workdir: /nosuch")
    shared.meant("a")
    assert divide([shared.made("c")]) == [planned("c", 0.667)]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    shared.file("a", run=f"sglang serve --model-path {broken}")
    shared.meant("a")
    told = divide([shared.made("c")])
    assert told[0].startswith("warning: a, which is meant to run here, is left out of the division: ")
    assert told[1:] == [planned("c", 0.942)]
    with shared.up("a"), pytest.raises(ConfigError, match="a is up, and shares GPU 0"):
        divide([shared.made("c")])
    shared.folders["a"].write_planned_fraction(0.5)
    with shared.up("a"):
        assert divide([shared.made("c")]) == [planned("c", 0.417)], "all of what it may take is left to it"


def test_a_neighbour_that_cannot_be_read_is_told_of(shared: Shared) -> None:
    shared.meant("a")
    (shared.folders["a"].path / "desired.json").write_text("{")
    with pytest.raises(ConfigError, match=r"desired\.json cannot be used .*: groundserve down a"):
        divide([shared.made("c")])
    shared.files["a"].write_text("service: {replicas: 0.5}\n")
    shared.meant("a")
    (told,) = divide([shared.made("c")])
    assert told.startswith("warning: a, which is meant to run here, is left out of the division: ")


def test_up_of_what_does_not_fit(one_gpu: Groundserve, tmp_path: Path) -> None:
    """It is told with the numbers, before anything starts."""
    sizes = {"a": 40, "b": 60}
    files = [
        one_gpu.service(
            name, f"sglang serve --model-path {model(tmp_path / f'model-{name}', size)}", replicas=1, gpu_share=True
        )
        for name, size in sizes.items()
    ]
    said = one_gpu("up", "-d", *files, code=1)
    assert "b does not fit on GPU 0 (80 GiB): it takes 63.0 GiB at the least, and 35.4 GiB are left beside a" in said
    assert one_gpu("status").startswith("No existing services.")


def test_up_of_what_is_not_here(one_gpu: Groundserve) -> None:
    """A model that was never fetched cannot be planned for: what to do is told before anything starts."""
    run = "sglang serve --model-path org/model"
    files = [one_gpu.service(name, run, replicas=1, gpu_share=True) for name in ("a", "b")]
    said = one_gpu("up", "-d", *files, code=1)
    assert "a is to share GPU 0 (80 GiB): nobody knows how large its weights are: groundserve pull org/model" in said


def test_check_of_several_files(one_gpu: Groundserve, tmp_path: Path) -> None:
    """The plan is a table; a file that asks for more is warned of."""
    folder = model(tmp_path / "model", 20)
    runs = {
        "a": f"sglang serve --model-path {folder} --mem-fraction-static 0.9",
        "b": f"sglang serve --model-path {folder}",
    }
    files = [one_gpu.service(name, run, replicas=1, gpu_share=True) for name, run in runs.items()]
    said = one_gpu("check", *files)
    assert "GPU 0 (pretended GPU, 80 GiB), shared by turns:" in said
    # 80 - 0.6 - 2 of the card, less 2 x (20 + 2) GiB.
    assert "  a        20.0 GiB  33.4 GiB  0.667\n  b        20.0 GiB  33.4 GiB  0.667\n" in said
    assert "a: --mem-fraction-static 0.9 in its file is more than the others leave it" in said
    assert "shared by turns" not in one_gpu("check", one_gpu.service("c", runs["b"], replicas=1))
    assert "check: error: -n names one service" in one_gpu("check", "-n", "x", *files, code=2)
