"""What a secret is given to: the replica, and nobody who looks."""

from pathlib import Path

from tests.operate.command_line import LAB, Groundserve

# Given in each way that there is.
SECRETS = {name: f"hush-{name.lower()}" for name in ("IN_FILE", "BY_ENV", "BY_ENV_FILE", "BY_SECRET", "BY_SECRET_FILE")}


def test_secrets_reach_the_replica_and_are_shown_nowhere(groundserve: Groundserve, tmp_path: Path) -> None:
    for name in ("BY_ENV_FILE", "BY_SECRET_FILE"):
        (tmp_path / name).write_text(f"{name}={SECRETS[name]}\n")
    given = [
        *("--env", f"BY_ENV={SECRETS['BY_ENV']}", "--env-file", tmp_path / "BY_ENV_FILE"),
        *("--secret", f"BY_SECRET={SECRETS['BY_SECRET']}", "--secret-file", tmp_path / "BY_SECRET_FILE"),
    ]
    seen = tmp_path / "seen"
    service = groundserve.service(
        "lab",
        "".join(f'echo "${name}" >> {seen}\n' for name in SECRETS) + LAB,
        replicas=1,
        more=f"envs: {{IN_FILE: {SECRETS['IN_FILE']}, BY_ENV: , BY_ENV_FILE: }}\n"
        "secrets: {BY_SECRET: , BY_SECRET_FILE: }",
    )
    text = service.read_text()
    # The probe's headers have them too, so the balancer is told.
    headers = ", ".join(f'"X-{name}": "${name}"' for name in SECRETS)
    service.write_text(text.replace('"path": "/health"', f'"path": "/health", "headers": {{{headers}}}'))
    understood = tmp_path / "understood.yaml"
    understood.write_text(
        "service: {replicas: 1}\nenvs: {BY_ENV: , BY_ENV_FILE: }\nsecrets: {BY_SECRET: , BY_SECRET_FILE: }\nrun: |\n"
        "  huggingface-cli login --token $BY_SECRET\n  huggingface-cli login --token hush-in-clear\n"
        "  sglang serve --model-path smollm2-135m --api-key $BY_ENV --admin-api-key=$BY_SECRET_FILE\n"
    )
    shows = tmp_path / "shows.yaml"
    shows.write_text(
        "service: {replicas: 1}\nenvs: {BY_ENV: , BY_ENV_FILE: }\nsecrets: {BY_SECRET: , BY_SECRET_FILE: }\n"
        'run: vllm serve a/b --port $GROUNDSERVE_PORT --api-key="${BY_SECRET}" --name $BY_ENV\n'
    )
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("readiness_probe", "readyness_probe"))
    refused = tmp_path / "refused.yaml"
    refused.write_text(text.replace('"replicas": 1', '"replicas": "$BY_SECRET"'))
    broken = groundserve.service("broken", "echo $GROUNDSERVE_PORT > /dev/null; exit 3", replicas=1)

    up = groundserve.up(service, *given).until_up()
    assert [line for line in groundserve.processes().values() if "hush-" in line and "balancer.cli" not in line] == []
    said = [
        groundserve("check", service, *given),
        groundserve("check", understood, *given),
        groundserve("check", shows, *given),
        groundserve("check", wrong, *given, code=1),
        groundserve("check", refused, *given, code=1),
        groundserve("status", "-v"),
        groundserve("status", "--json"),
        groundserve("update", "lab", service, *given),
        groundserve("update", "lab", refused, *given, code=1),
        groundserve("update", "lab", broken, *given, code=1),
        groundserve("scale", "lab", "2"),
        groundserve("logs", "lab"),
        groundserve("logs", "lab", "--balancer"),
        groundserve("down", "lab"),
    ]
    up.wait()
    assert seen.read_text().split()[: len(SECRETS)] == list(SECRETS.values())
    assert "run: SGLang serves smollm2-135m --api-key *** --admin-api-key=***" in said[1]
    assert "run: --api-key $BY_SECRET shows a secret to all users of this machine" in said[2]
    assert "--name" not in said[2]
    assert "$BY_SECRET" in said[4]
    assert [text for text in (up.text, *said) if "hush-" in text] == []
    files = [file for file in (tmp_path / "state").rglob("*") if file.is_file()]
    assert {"replica-1.log", "balancer.log", "service.yaml"} <= {file.name for file in files}
    # The balancer's own file has the headers, in a folder that is its owner's alone.
    assert {file.name for file in files if b"hush-" in file.read_bytes()} == {"service.yaml"}
    assert (tmp_path / "state/groundserve/lab").stat().st_mode & 0o077 == 0


def test_a_failed_update_leaves_no_secret_behind(groundserve: Groundserve, tmp_path: Path) -> None:
    """A restart and a rollback start with those of the version that serves."""
    seen = tmp_path / "seen"
    more = "secrets: {KEY: }"
    script = f'echo "$KEY" >> {seen}\n'
    groundserve.up(groundserve.service("lab", script + LAB, replicas=1, more=more), "--secret", "KEY=first").until_up()
    broken = groundserve.service("lab", f"{script}: $GROUNDSERVE_PORT; exit 3", replicas=1, more=more)
    assert "lab stays at version 1" in groundserve("update", "lab", broken, "--secret", "KEY=second", code=1)
    assert set(seen.read_text().split()) == {"first", "second"}
    seen.unlink()
    assert "lab is at version 3" in groundserve("restart", "lab")
    assert seen.read_text() == "first\n"
