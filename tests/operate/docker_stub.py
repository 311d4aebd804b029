#!/usr/bin/env python3
"""`docker` as far as the Compose engine uses it. A container is a file in $DOCKER_STUB and a process that sleeps.

What it cannot do, as a real one cannot start an image that is not there: a replica whose command has BROKEN in it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("DOCKER_STUB", "/nowhere"))
PROJECT, SERVICE = "com.docker.compose.project", "com.docker.compose.service"


def containers(project: str, service: str = "", folder: Path = FOLDER) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # it is removed meanwhile
            found.append(json.loads(path.read_text()))
    return [one for one in found if one["labels"][PROJECT] == project and service in ("", one["labels"][SERVICE])]


def is_alive(container: dict[str, Any]) -> bool:
    try:
        stat = Path(f"/proc/{container['pid']}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def kill(container: dict[str, Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(container["pid"], signal.SIGKILL)
    while is_alive(container):
        time.sleep(0.01)


def run(project: str, service: str, files: list[str]) -> None:
    overlay = json.loads(Path(files[-1]).read_text())["services"][service]
    if "BROKEN" in str(overlay.get("command")):
        sys.exit("the image is not there")
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(["sleep", "600"], stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    id = uuid.uuid4().hex
    labels = {**overlay.get("labels", {}), PROJECT: project, SERVICE: service}
    facts = {"id": id, "pid": process.pid, "labels": labels, "started": datetime.now(UTC).isoformat()}
    facts["image"] = image()
    facts["sources"] = [volume.partition(":")[0] for volume in overlay.get("volumes", [])]
    (FOLDER / f"{id}.new").write_text(json.dumps(facts))
    (FOLDER / f"{id}.new").rename(FOLDER / f"{id}.json")


def image() -> str:
    """What the one image's name stands for."""
    built = FOLDER.parent / "built"
    return built.read_text() if built.exists() else "sha256:first"


def compose(words: list[str]) -> None:
    project, files = "", []
    while words and words[0].startswith("-"):
        flag, value, *words = words
        project = value if flag == "-p" else project
        files += [value] if flag == "-f" else []
    match words:
        case ["up", *flags, service]:
            for one in containers(project, service) if "--force-recreate" in flags else []:
                remove(one)
            scale = [flag.partition("=")[2] for flag in flags if "=" in flag]
            for _ in range(int(scale[0] if scale else 1) - len(containers(project, service))):
                run(project, service, files)
        case ["stop" | "kill", service]:
            for one in containers(project, service):
                kill(one)
        case ["down", *_]:
            for one in containers(project):
                remove(one)


def remove(container: dict[str, Any]) -> None:
    kill(container)
    (FOLDER / f"{container['id']}.json").unlink(missing_ok=True)


def inspected(container: dict[str, Any]) -> dict[str, Any]:
    return {
        "Id": container["id"],
        "State": {"StartedAt": container["started"], "Running": is_alive(container), "ExitCode": 137},
        "Config": {"Labels": container["labels"], "Image": "groundserve/replica:latest"},
        "Image": container["image"],
        "RestartCount": 0,
        "NetworkSettings": {"Networks": {"default": {"IPAddress": f"127.9.0.{len(list(FOLDER.iterdir()))}"}}},
    }


def main(words: list[str]) -> None:
    # Docker as it may be: silent, or not there.
    if (FOLDER.parent / "silent").exists():
        time.sleep(600)
    if (FOLDER.parent / "away").exists():
        sys.exit("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    match words:
        case ["image", "inspect", *_]:
            print(image())
        case ["compose", *rest]:
            compose(rest)
        case ["ps", *filters]:
            wanted = dict(word.removeprefix("label=").split("=") for word in filters if "=" in word)
            source = next((word.removeprefix("volume=") for word in filters if word.startswith("volume=")), None)
            for one in containers(wanted[PROJECT], wanted.get(SERVICE, "")):
                if source is None or source in one["sources"]:
                    print(one["id"])
        case ["inspect" | "logs" | "stop" | "rm" as verb, *_, id]:
            path = FOLDER / f"{id}.json"
            if not path.is_file():
                sys.exit(f"No such container: {id}")
            container = json.loads(path.read_text())
            if verb == "inspect":
                print(json.dumps([inspected(container)]))
            elif verb == "stop":
                kill(container)
            elif verb == "rm":
                if (FOLDER.parent / "busy").exists():
                    sys.exit("Error response from daemon: removal of the container is already in progress")
                remove(container)
            else:
                said = FOLDER.parent / "said"
                print(said.read_text() if said.exists() else "", end="", flush=True)
                while is_alive(container):
                    time.sleep(0.01)
                    if (FOLDER.parent / "away").exists():
                        sys.exit("error from daemon in stream: unexpected EOF")


if __name__ == "__main__":
    main(sys.argv[1:])
