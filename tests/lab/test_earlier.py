"""An earlier prefix_aware is played beside today's, with the modules of its own commit."""

import subprocess
import sys
from pathlib import Path

import pytest

from balancer.routing import prefix_aware as today
from tests.lab import earlier
from tests.lab.simulate import main

FOLDER = Path("balancer/routing")


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A commit of another repository, in which a prefix never leaves its replica."""
    (tmp_path / FOLDER).mkdir(parents=True)
    for name in earlier.MODULES:
        text = (earlier.ROOT / FOLDER / f"{name}.py").read_text()
        text = text.replace("COPY_PRICE = 12.0", "COPY_PRICE = 1e9").replace(
            "PrefixIndex:", "PrefixIndex:\n    old = 1"
        )
        (tmp_path / FOLDER / f"{name}.py").write_text(text)

    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@x")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    monkeypatch.setattr(earlier, "ROOT", tmp_path)
    return git("rev-parse", "HEAD").strip()


def test_policy_of_a_commit(commit: str) -> None:
    made = earlier.prefix_aware(commit)
    assert vars(sys.modules[made.__module__])["COPY_PRICE"] == 1e9
    assert today.COPY_PRICE == 12
    index = vars(made())["index"]
    assert index.old == 1, "its own index, too"
    assert not hasattr(today.PrefixIndex, "old")


def test_it_is_played_beside_todays(commit: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One that never copies leaves a prompt that all share where it first came."""
    play = ["--replicas", "2", "--workload", "hot prompt", "--pools", "full", "--policy", "prefix_aware"]
    main([*play, f"prefix_aware@{commit}"])
    said = capsys.readouterr().out.partition("hot prompt, pools full")[2]
    now, then = (float(line.split()[1]) for line in said.splitlines() if line.startswith("prefix_aware"))
    assert now > 1.2 * then


@pytest.mark.parametrize("name", ["prefix_awares", "least_load@HEAD", "prefix_aware@nothing", "prefix_aware@"])
def test_what_is_no_policy_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--policy", name])
    assert "--policy: " in capsys.readouterr().err


def test_figures_over_seeds_are_means(capsys: pytest.CaptureFixture[str]) -> None:
    def row(*words: str) -> list[float]:
        main(["--replicas", "3", "--workload", "chat", "--pools", "empty", "--policy", "least_load", *words])
        said = capsys.readouterr().out.partition("chat, 3 replicas")[2]
        return [float(cell) for cell in said.split("least_load")[1].split()[:7]]

    one, two, both = row("--seed", "5"), row("--seed", "6"), row("--seed", "5", "--seeds", "2")
    assert one != two
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(one, two, strict=True)], abs=0.01)
