"""Files that are no service files, or odd ones: one line with file and line for each, and never more than that."""

import itertools
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.errors import ConfigError
from balancer.spec import text_file
from balancer.spec.service_file import Spec, load, parse
from balancer.spec.settings import ReadinessProbe
from balancer.spec.text_file import MAX_BYTES

GOOD = "service: {readiness_probe: /health, replicas: 1}\nrun: serve --port $GROUNDSERVE_PORT\n"


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse(text, source="a/file.yaml")
    message = str(raised.value)
    assert message.isprintable()
    assert message.startswith("a/file.yaml:")
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "service:\n  replicas: {{ replicas }}\n",
            ":2: service.replicas has a list or a mapping for a key: if this is {{ a template }}, fill it in first",
        ),
        ("service: {}\n? [a, b]\n: 1\n", ":2: the file has a list or a mapping for a key"),
        ("service: {}\n? {a: b}\n: 1\n", ":2: the file has a list or a mapping for a key"),
        ("service: {}\n~: 1\n", ":2: the file has ~ for a key, which is not text: put it in quotes"),
        ("service: {}\n? \n: 1\n", ":2: the file has nothing at all for a key"),
        ("service: {}\nenvs:\n  on: 1\n", ":3: envs has on for a key, which is not text"),
        ("service: {}\nenvs:\n  7: 1\n", ":3: envs has 7 for a key"),
        ("service: {}\nenvs: {A: &x [*x]}\n", ":2: not valid YAML: the alias *x refers to a value that contains it"),
        ("service: &s\n  a: {b: [*s]}\n", ":2: not valid YAML: the alias *s refers to a value that contains it"),
        ("service: {}\nname: *nobody\n", ":2: not valid YAML: found undefined alias 'nobody'"),
        ("service: {}\n" + "[" * 90 + "]" * 90, "not valid YAML"),
        ("service: {}\nenvs: " + "[" * 90 + "]" * 90, ":2: not valid YAML: it is nested more than 50 deep"),
        ("service: {}\nenvs: " + "{a: " * 90 + "}" * 90, ":2: not valid YAML: it is nested more than 50 deep"),
        ("service: {}\nenvs: " + "\n" + "".join(" " * n + "- \n" for n in range(90)), "more than 50 deep"),
        (f"service: {{}}\nconfig: [{'1,' * 20_000}]", ":2: not valid YAML: it holds more than 10,000 values"),
        ("service: {}\nname: a\nname: b", ":3: name is given twice: keep one"),
        ("service: {}\nenvs: {A: 1, 'A': 2}", ":2: envs.A is given twice: keep one"),
        ('service: {}\nname: "a\\0b"', ":2: name contains a NUL or half a character"),
        ('service: {}\nrun: "echo \\ud83d"', ":2: run contains a NUL or half a character"),
        ('service: {}\nenvs: {"A\\0": 1}', ":2: envs contains a NUL or half a character"),
        ("service: {}\n\nname: a\0b", ":3: not valid YAML: special characters are not allowed"),
        ('service: {}\nname: "\\UFFFFFFFF"', ":2: not valid YAML: "),
        ("service:\n\treplicas: 1", ":2: not valid YAML: found character '\\t' that cannot start any token"),
        ("service: {}\n---\nservice: {}", ":2: not valid YAML: but found another document"),
        ("service: {}\nname: !!python/object:os.system x", ":2: not valid YAML: could not determine a constructor"),
        ("service: {replicas: 1" + "0" * 5000 + "}", ":1: not valid YAML: Exceeds the limit"),
        ("service: {}\nenvs: {A: 2024-99-99}", ":2: not valid YAML: month must be in 1..12"),
        ("service: {}\nenvs: {A: !!int x}", ":2: not valid YAML: "),
        ("service: {}\nenvs: {A: !!bool x}", ":2: not valid YAML: "),
        ("service: {}\nenvs: {A: !!float ''}", ":2: not valid YAML: "),
        ("service: {}\nenvs: {A: !!timestamp x}", ":2: not valid YAML: "),
        ("a: [", ":1: not valid YAML: "),
        ("%YAML 9.9\n---\nservice: {}", ":1: not valid YAML: found incompatible YAML document"),
        ("service: {}\n<<: 7", ":2: not valid YAML: expected a mapping or list of mappings for merging"),
        ('service: {"a\\nb\\e[1m": 1}', ":1: service.'a\\nb\\x1b[1m' is unknown"),
        ("service:\n  " + "x" * 900 + ": 1", ":2: service.xxx"),
        ("service: {replicas: " + "x" * 5000 + "}", ":1: service.replicas should be a valid integer"),
        ("service: {}\nenvs: {A: " + "x" * 140_000 + "}", ":2: envs.A is longer than 128 KiB: put it into a file"),
        ("service: {}\nrun: " + "x" * 140_000, ":2: run should be less than 128 KiB: move it into a script file"),
        (
            "service: {readiness_probe: {path: /, headers: {$A: 1, $B: 2}}}\nenvs: {A: x, B: x}",
            "has the same key twice once",
        ),
        ("service: {}\nworkdir: ~nobody-of-that-name/x", ":2: workdir names the home of a user who does not exist"),
        ("service: {tls: {keyfile: ~nobody-of-that-name/x, certfile: c}}", ":1: service.tls.keyfile names the home of"),
        ("service: {readiness_probe: {path: /, timeout_seconds: .nan}}", ":1: service.readiness_probe.timeout_seconds"),
        ("service: {readiness_probe: {path: /, timeout_seconds: .inf}}", ":1: service.readiness_probe.timeout_seconds"),
        ('service: {readiness_probe: "/a\\r\\nb: c"}', ":1: service.readiness_probe should be one line of printable"),
        (
            f"service: {{readiness_probe: {{path: /, post_data: '{{\"a\": {'[' * 900 + ']' * 900}}}'}}}}",
            ":1: service.readiness_probe post_data should be smaller: at most 5,000 values, 40 deep",
        ),
        (
            f"service: {{readiness_probe: {{path: /, post_data: '{{\"a\": [{'1,' * 6000}1]}}'}}}}",
            ":1: service.readiness_probe post_data should be smaller: at most 5,000 values, 40 deep",
        ),
        (
            'service: {readiness_probe: {path: /, post_data: \'{"a": "\\u0000"}\'}}',
            ":1: service.readiness_probe post_data should not contain a NUL",
        ),
        (
            "service: {}\nresources: {any_of: [{any_of: [{memory: 4}]}]}",
            ":2: resources.any_of[0] has alternatives of its",
        ),
        ("service: {replicas: .inf}", ":1: service.replicas should be a finite number"),
        ("service: {}\nx-groundserve: {idle_timeout: .nan}", ":2: x-groundserve.idle_timeout should be"),
        ("service: {}\nx-groundserve: {stop_grace: .inf}", ":2: x-groundserve.stop_grace should be"),
        ("service: {}\nresources: {memory: .nan}", ":2: resources.memory should be"),
        ("service: {}\nresources: {memory: true}", ":2: resources.memory should be a number, not true or false"),
        ("service: {}\nresources: {cpus: -4}", ":2: resources.cpus should be a number"),
        ("service: {}\nresources: {accelerators: [{L4: 1}]}", ":2: resources.accelerators should be like 'L4:1'"),
        ("service: {}\nresources: {ports: 9" + "9" * 400 + "}", ":2: resources.ports should be the one port"),
    ],
)
def test_each_odd_file_gets_one_line_with_its_place(text: str, said: str) -> None:
    message = refusal(text)
    assert said in message
    assert len(message) < 500


def test_aliases_that_multiply_cost_neither_time_nor_memory() -> None:
    names = "abcdefghi"
    lines = [f"x{names[0]}: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"x{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(names)]
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refusal("\n".join(lines) + "\nservice: {}")
    assert said == "a/file.yaml:5: not valid YAML: it holds more than 10,000 values, aliases counted"
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_variables_that_multiply_are_refused() -> None:
    many = ", ".join(["$A"] * 5000)
    text = f"service: {{readiness_probe: {{path: /, post_data: {{a: [{many}]}}}}}}\nenvs: {{A: {'x' * 1000}}}"
    assert refusal(text).endswith("becomes longer than 131,072 characters once variables are filled in")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "more than 50 deep"),
        ("a: [" + "[]," * 60_000, "more than 10,000 values"),
        ("a: " + '"' + "x\n\n" * 80_000 + '"', "there is no `service:` section"),
        ("#" * 250_000, "a mapping with a `service:` section"),
        ("? " * 100_000, "more than 50 deep"),
        ("- " * 100_000, "more than 50 deep"),
        ("a: &x " * 40_000, "not valid YAML"),
        ("{" * 100_000, "more than 50 deep"),
        ("a: " + "9" * 200_000, "Exceeds the limit"),
        ("a: '" + "x" * 200_000, "not valid YAML"),
        ("\n".join(f"k{n}: {n}" for n in range(20_000)), "more than 10,000 values"),
    ],
    ids=lambda text: text[:12],
)
def test_the_largest_files_are_judged_within_seconds(text: str, said: str) -> None:
    assert len(text) < MAX_BYTES
    began = time.process_time()
    with pytest.raises(ConfigError, match=said):
        parse(text, source="x")
    assert time.process_time() - began < 4


# What stands in the file, as bytes


def path_of(folder: Path, data: bytes) -> Path:
    path = folder / "x.yaml"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace("\n", "\r").encode(),
        b"---\n" + GOOD.encode() + b"...\n",
    ],
)
def test_byte_order_mark_and_line_ends(tmp_path: Path, data: bytes) -> None:
    """A byte order mark and other line ends make no difference."""
    assert load(path_of(tmp_path, data)) == load(path_of(tmp_path, GOOD.encode()))


def test_a_scripts_lines_end_as_bash_wants_them(tmp_path: Path) -> None:
    path = path_of(tmp_path, b"service: {}\r\nrun: |\r\n  one \\\r\n    two\r\n  three\r\n")
    assert load(path).run == "one \\\n  two\nthree\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", ": a service YAML is a mapping"),
        (b"\n# nothing\n", ": a service YAML is a mapping"),
        (b"service: {}\nname: \xe4", ":2: not UTF-8 text: save it as UTF-8, or give the path of a service YAML"),
        (GOOD.encode("utf-16"), ":1: not UTF-8 text: save it as UTF-8"),
        (GOOD.encode("utf-16-le"), ":1: not valid YAML: special characters are not allowed"),
        (b"\x7fELF\x02\x01\x01\0", ":1: not valid YAML: special characters are not allowed"),
        (b"#" * (MAX_BYTES + 1), ": larger than 256 KiB: give the path of a service YAML"),
    ],
)
def test_other_bytes_get_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = path_of(tmp_path, data)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}{said}")


def folder(path: Path) -> None:
    path.mkdir()


def silent_pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def itself(path: Path) -> None:
    path.symlink_to(path)


def nothing(path: Path) -> None:
    """Leaves no file there."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (folder, "it is a folder"),
        (silent_pipe, "a service YAML is a mapping"),
        (endless, "larger than 256 KiB"),
        (itself, "Too many levels of symbolic links"),
        (nothing, "No such file or directory"),
    ],
)
def test_what_is_no_file_gets_one_line_and_holds_nobody_up(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "x.yaml"
    make(path)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: {said}")


def test_pipe_of_a_shell() -> None:
    """A pipe from a shell's <(command) is read to its end, and waited for only for a limited time."""
    out, into = os.pipe()
    os.write(into, GOOD.encode())
    os.close(into)
    assert load(f"/dev/fd/{out}", name="x").run.startswith("serve")
    os.close(out)
    out, into = os.pipe()
    with pytest.raises(ConfigError, match="nothing comes out of this pipe: give the path of a service YAML"):
        text_file.read(f"/dev/fd/{out}", "x", "a service YAML", patience=0.1)
    os.close(out)
    os.close(into)


# Everything else: trees around a valid file

KEYS = st.sampled_from(
    [
        *("name", "service", "readiness_probe", "path", "headers", "post_data", "replicas", "replica_policy"),
        *("min_replicas", "max_replicas", "target_qps_per_replica", "load_balancer", "stream_timeout_seconds", "tls"),
        *("keyfile", "certfile", "ports", "resources", "accelerators", "cpus", "memory", "any_of", "ordered"),
        *("envs", "secrets", "workdir", "setup", "run", "num_nodes", "x-groundserve", "queue_size", "restart_limit"),
        *(
            "file_mounts",
            "config",
            "volumes",
            "pool",
            "image_id",
            "A",
            "load_balancing_policy",
            "<<",
            "",
            "idle_timeout",
        ),
    ]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=8),
    st.text(max_size=12),
    st.sampled_from(["$A", "~", "/", "L4:2", "24GB+", "4x", "8000-8010", "4GiB", "~nobody/x", "a\0", "1e400", "{}"]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=5),
        st.dictionaries(st.one_of(st.text(max_size=6), st.integers(), st.booleans(), st.none()), inner, max_size=3),
        st.sets(st.sampled_from(["L4", "A100:1"])),
    ),
    max_leaves=25,
)
SERVICES = st.fixed_dictionaries(
    {},
    optional={
        "readiness_probe": st.one_of(
            TREES, st.fixed_dictionaries({"path": st.just("/")}, optional={"post_data": TREES})
        ),
        "replicas": st.one_of(LEAVES, st.just(2)),
        "replica_policy": TREES,
        "load_balancing_policy": st.one_of(LEAVES, st.just("least_load")),
        "load_balancer": TREES,
        "ports": LEAVES,
        "tls": TREES,
    },
)
SECTIONS = (
    "resources",
    "envs",
    "secrets",
    "workdir",
    "run",
    "setup",
    "x-groundserve",
    "file_mounts",
    "num_nodes",
    "name",
)
FILES = st.fixed_dictionaries({"service": st.one_of(SERVICES, TREES)}, optional=dict.fromkeys(SECTIONS, TREES))


def judged(text: str) -> Spec | None:
    """The service of a file, or None where it was refused as a file should be."""
    try:
        return parse(text, source="a/file.yaml")
    except ConfigError as refused:
        message = str(refused)
    assert message.isprintable()
    assert message.startswith("a/file.yaml:")
    return None


@settings(max_examples=150, deadline=None)
@given(FILES)
def test_any_tree_is_a_service_or_refused_by_name(tree: dict[str, Any]) -> None:
    try:
        text = yaml.safe_dump(tree)
    except TypeError:
        text = yaml.safe_dump(tree, sort_keys=False)
    service = judged(text)
    if service is not None:
        # Whatever is taken can be handed to a balancer, which understands it alike.
        handed = parse(service.for_balancer(service.readiness_probe or ReadinessProbe()), source="handed.yaml")
        assert (handed.policy, handed.settings) == (service.policy, service.settings)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_to_a_text_is_refused_by_name(data: st.DataObject) -> None:
    text = (
        "name: x\nservice:\n  readiness_probe: {path: /health, headers: {a: $A}}\n  replica_policy:\n"
        "    min_replicas: 1\nresources: &r\n  accelerators: {L4: 1, A100: 1}\n  memory: 16+\n  ports: [8000]\n"
        "envs: {A: 1, B: }\nconfig: *r\nrun: |\n  serve --port ${GROUNDSERVE_PORT:-8000}\n"
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(
            st.one_of(
                st.text(max_size=3),
                st.sampled_from(
                    ["\t", "*r", "&r ", "{{ x }}", "? ", "- ", "!!int ", "<<: ", "\0", "\ufeff", "'", "|\n", "---\n"]
                ),
            )
        )
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 5)) :]
    judged(text)
