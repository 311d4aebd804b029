"""Whether a folder lies on a disk of this machine: locks and shared memory do not work over a network's."""

import os
from pathlib import Path

# By the names in /proc/self/mountinfo; FUSE's begin with "fuse.".
NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "glusterfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "ocfs2",
    "smb3",
    "virtiofs",
}
NETWORK_FUSE = {"ceph", "davfs2", "gcsfuse", "glusterfs", "goofys", "juicefs", "mfs", "rclone", "s3fs", "sshfs"}
MOUNTS = Path("/proc/self/mountinfo")


def network_type(folder: Path, mounts: Path = MOUNTS) -> str:
    """The type of the network file system on which the folder (or where it would be) lies; empty for a local one."""
    at = os.path.realpath(folder)
    best, kind = "", ""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode().decode("unicode_escape")
        if len(point) >= len(best) and (at == point or at.startswith(point.rstrip("/") + "/")):
            best, kind = point, after.split(" ")[0]
    family, _, program = kind.partition(".")
    return kind if kind in NETWORK or (family == "fuse" and program in NETWORK_FUSE) else ""
