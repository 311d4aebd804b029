"""replica/media.py: what a request may name as an image, a video or a sound, and which addresses may be asked."""

from base64 import b64encode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replica.media import MediaError, MediaPolicy, check_content, is_public

STRICT = MediaPolicy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that the operator allows, with a file; beside it a file that nobody may have."""
    (tmp_path / "allowed/deep").mkdir(parents=True)
    (tmp_path / "allowed/a cat.png").write_bytes(b"cat")
    (tmp_path / "allowed-not").mkdir()
    for name in ("secret.png", "allowed-not/x.png"):
        (tmp_path / name).write_bytes(b"secret")
    (tmp_path / "allowed/link.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "allowed"


@pytest.mark.parametrize("source", ["data:image/png;base64,AAAA", "http://a/b.png", "https://a/b.png?c=/etc/passwd"])
def test_data_and_the_web_pass_as_they_are(source: str) -> None:
    assert STRICT.settle(source) == source


def test_a_scheme_in_capitals_is_the_web_too() -> None:
    assert STRICT.settle("HTTPS://A/b.PNG") == "https://A/b.PNG"


@pytest.mark.parametrize("source", ["iVBORw0KGgo=", "/9j/4AAQSkZJRg==", "etc/passwd//"])
def test_bare_base64_can_only_be_data(source: str) -> None:
    assert STRICT.settle(source) == f"data:;base64,{source}"


@pytest.mark.parametrize(
    "source",
    [
        *("file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "file:etc", "file://localhost/etc/passwd"),
        *("/etc/passwd", "/etc/hosts", "~/x.png", "~root/x.png", "x.png", "../x.png", "./x", " /etc/passwd", "\t/x"),
        *("ftp://a/b", "s3://a/b", "video:/etc/passwd", "concat:/a|/b", "pipe:0", "unix:/x", "", "//a/b", r"\\a\b"),
        *("http:/a", "http:a", "gopher://a", "/proc/self/environ", "/dev/zero", "x\0.png"),
    ],
)
def test_all_else_is_refused_and_says_what_the_operator_may_set(source: str, folder: Path) -> None:
    with pytest.raises(MediaError, match="ALLOWED_LOCAL_MEDIA_PATH"):
        STRICT.settle(source)
    with pytest.raises(MediaError, match="no such file in the folder that the operator allows"):
        MediaPolicy(local=folder).settle(source)


def test_a_file_in_the_allowed_folder_is_named_by_its_real_path(folder: Path) -> None:
    allowed = MediaPolicy(local=folder)
    wanted = str(folder / "a cat.png")
    assert allowed.settle(wanted) == wanted
    assert allowed.settle(f"file://{folder}/a%20cat.png") == wanted
    assert allowed.settle(f"{folder}/deep/../a cat.png") == wanted


@pytest.mark.parametrize(
    "name", ["../secret.png", "link.png", "deep", "none.png", "../allowed-not/x.png", "..%2fsecret.png", ""]
)
def test_nothing_outside_it_and_no_way_to_tell_what_is_there(folder: Path, name: str) -> None:
    for source in (f"{folder}/{name}", f"file://{folder}/{name}"):
        with pytest.raises(MediaError, match="no such file in the folder"):
            MediaPolicy(local=folder).settle(source)


def test_a_long_source_is_shown_only_by_its_beginning() -> None:
    with pytest.raises(MediaError) as refused:
        STRICT.settle("file:///" + "x" * 100_000)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "wrap",
    [
        lambda source: source,
        lambda source: [source],
        lambda source: ["data:,AAAA", ["data:,AAAA", source]],
        lambda source: ("data:,AAAA", source),
        lambda source: SimpleNamespace(url=source),
        lambda source: [[SimpleNamespace(url=source, detail="auto")]],
        lambda source: {"url": source},
        lambda source: {"format": "processor_output", "more": {"video_path": source}},
        lambda source: [{"anything": source}],
        lambda source: {"video": [1.5, source]},
    ],
)
def test_a_source_is_found_wherever_it_is_put(wrap: Any) -> None:
    STRICT.settle_all(wrap("https://a/b"))
    with pytest.raises(MediaError, match="/etc/passwd"):
        STRICT.settle_all(wrap("/etc/passwd"))


def test_what_is_no_source_stays_as_it_is() -> None:
    given = {"format": "processor_output", "feature": [[0.5, 1]], "modality": "IMAGE", "url": "AAAA", "none": None}
    assert STRICT.settle_all([given, None, b"x"]) == [{**given, "url": "data:;base64,AAAA"}, None, b"x"]


def test_lists_that_are_nested_without_end_are_refused() -> None:
    nested: Any = "data:,AAAA"
    for _ in range(1000):
        nested = [nested]
    with pytest.raises(MediaError, match="nested more than"):
        STRICT.settle_all(nested)


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nhttp://169.254.169.254/x.ts\n",
        b"#EXTM3U\n\0\xff",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<?xml?>" + b" " * 100_000 + b"<MPD profiles='urn:mpeg:dash:profile:full'>",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 10.0.0.1\r\n",
    ],
)
def test_a_list_of_further_addresses_is_no_media(content: bytes) -> None:
    with pytest.raises(MediaError, match="a playlist, not an image"):
        check_content(content)
    for source in (f"data:audio/wav;base64,{b64encode(content).decode()}", b64encode(content).decode()):
        with pytest.raises(MediaError, match="a playlist, not an image"):
            STRICT.settle(source)


TAG = b"ID3\x04\0\0\0\0\0\0"
TAGS = {
    "one": TAG,
    "two": TAG * 2,
    "with zeros in it": b"ID3\x04\0\0\0\0\x02\x05" + bytes(256 + 5),
    "longer than the first look": b"ID3\x03\0\0\0\x02\0\0" + bytes(2 << 14),
    "with a footer": b"ID3\x04\0\x10\0\0\0\x03" + bytes(3 + 10),
}


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("playlist", [b"#EXTM3U\n", b"ffconcat version 1.0\n", b"<?xml version='1.0'?><MPD>"])
def test_a_tag_in_front_hides_no_playlist(tags: bytes, playlist: bytes) -> None:
    """FFmpeg skips ID3v2 tags before it looks what the rest is."""
    content = tags + playlist
    for check in (
        lambda: check_content(content),
        lambda: STRICT.settle(f"data:audio/mpeg;base64,{b64encode(content).decode()}"),
    ):
        with pytest.raises(MediaError, match="a playlist, not an image"):
            check()


def test_a_tagged_sound_passes() -> None:
    for tags in (*TAGS.values(), b"ID3\x04\0\0\x7f\x7f\x7f\x7f"):
        sound = tags + b"\xff\xfb\x90d" + bytes(100)
        check_content(sound)
        source = f"data:audio/mpeg;base64,{b64encode(sound).decode()}"
        assert STRICT.settle(source) == source


@pytest.mark.parametrize("end", [",x", ",", "=,x", "\n", "*", "A"])
def test_a_data_url_that_loaders_read_differently(end: str) -> None:
    """SGLang's loader of sounds takes what stands between the first two commas, others all after the first."""
    playlist = b64encode(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1/x.ts\n\n").decode()
    with pytest.raises(MediaError, match=r"one comma|must be base64"):
        STRICT.settle(f"data:audio/wav;base64,{playlist.rstrip('=')}{end}")
    with pytest.raises(MediaError, match="one comma"):
        STRICT.settle("data:image/png")


def test_true_media_are_not_looked_through() -> None:
    check_content(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR <MPD c=IN IP4 ffconcat #EXTM3U")
    check_content(b"RIFF\x24\x08\0\0WAVEfmt ")


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.215.14", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_the_public_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.1.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "fe80::1%lo", "fc00::1", "fd00:ec2::254"),
        *("fec0::1", "ff02::1", "2001:db8::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
        "2001:0:4136:e378:8000:63bf:80ff:fffe",  # Teredo of 127.0.0.1
    ],
)
def test_all_other_addresses_however_they_are_written(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "::1", "::ffff:127.0.0.1"],
)
def test_a_host_that_leads_to_this_machine_is_not_asked(host: str) -> None:
    with pytest.raises(MediaError, match="ALLOW_PRIVATE_MEDIA=1"):
        STRICT.addresses(host, 80)


def test_private_addresses_are_asked_where_the_operator_says_so() -> None:
    assert MediaPolicy(private=True).addresses("127.0.0.1", 80) == ["127.0.0.1"]


def test_named_hosts_are_the_only_ones() -> None:
    named = MediaPolicy.read({"ALLOWED_MEDIA_DOMAINS": "Images.Example, cdn.example."})
    named.check_host("images.example", "u")
    named.check_host("CDN.example.", "u")
    for host in ("example", "x.images.example", "images.example.evil", ""):
        with pytest.raises(MediaError, match=r"from cdn\.example, images\.example only"):
            named.check_host(host, "http://u/")
    STRICT.check_host("anything", "u")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (
            {"ALLOWED_LOCAL_MEDIA_PATH": "/nowhere/at/all"},
            "ALLOWED_LOCAL_MEDIA_PATH=/nowhere/at/all: this is not a folder",
        ),
        ({"ALLOW_PRIVATE_MEDIA": "yes"}, "ALLOW_PRIVATE_MEDIA=yes: use 0 or 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MediaPolicy.read(environ)


def test_a_policy_is_handed_on_through_the_environment(tmp_path: Path) -> None:
    for policy in (STRICT, MediaPolicy(frozenset({"a", "b"}), tmp_path.resolve(), True)):
        assert MediaPolicy.read(policy.environ()) == policy
