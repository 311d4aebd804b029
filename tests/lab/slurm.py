"""A real Slurm on hosts of the lab: its controller on `ctl`, and nodes with three GPUs each, devices without a driver.

python -m tests.lab.slurm COMMAND...     # makes the Debian root, then runs COMMAND where hosts can be made
LAB_DEBIAN=trixie python -m ...          # with the Slurm of another Debian

with SlurmLab(folder, nodes=2) as slurm:
    slurm.ctl.run("sinfo")           # as root; user="ada" for the one who serves
    slurm.nodes["h1"].power_off()
"""

import secrets
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from tests.lab.hosts import Host, Hosts, main, obstacle, root_with
from tests.support.until import wait_until

GPUS = 3  # of each node
PACKAGES = ("munge", "slurm-client", "slurmctld", "slurmd")
NOTHING: Mapping[str, object] = MappingProxyType({})
_CONF = """\
ClusterName=lab
SlurmctldHost=ctl
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/var/lib/slurm/ctld
SlurmdSpoolDir=/var/lib/slurm/d
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
MailProg=/bin/true
SchedulerParameters=sched_interval=1,bf_interval=1
MinJobAge=60
SlurmdParameters=config_overrides
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
"""


class SlurmLab:
    """`settings` are lines for slurm.conf, on top of those above."""

    def __init__(self, folder: Path, nodes: int = 2, settings: Mapping[str, object] = NOTHING) -> None:
        names = [f"h{number}" for number in range(1, nodes + 1)]
        self.hosts = Hosts(root_with(PACKAGES), ["ctl", *names], folder)
        self.shared = self.hosts.shared
        self.ctl = self.hosts["ctl"]
        self.nodes = {name: self.hosts[name] for name in names}
        self._folder = folder
        self._daemons: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        lines = [_CONF, *(f"{name}={value}" for name, value in settings.items())]
        size = f"CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{GPUS}"
        lines += [f"NodeName={host.name} NodeAddr={host.address} {size}" for host in self.nodes.values()]
        lines.append(
            f"PartitionName=gpu Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
        )
        key = secrets.token_bytes(128)
        for host in (self.ctl, *self.nodes.values()):
            host.write("/etc/slurm/slurm.conf", "\n".join([*lines, ""]))
            host.write("/etc/slurm/gres.conf", f"NodeName=h[1-{nodes}] Name=gpu File=/dev/nvidia[0-{GPUS - 1}]\n")
            host.write("/etc/slurm/cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
            host.write("/etc/munge/munge.key", key, 0o400)
            self.boot(host)

    def boot(self, host: Host) -> None:
        """Starts its daemons, as its init would."""
        gpus = " ".join(f"mknod /dev/nvidia{number} c 195 {number};" for number in range(GPUS))
        keys = "chown munge: /etc/munge/munge.key; install -d -o munge /run/munge;"
        host.run("sh", "-c", f"{gpus} {keys} mkdir -p /var/lib/slurm/ctld /var/lib/slurm/d")
        host.run("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged")
        self._start(host, "slurmctld" if host is self.ctl else "slurmd")

    def bring_back(self, name: str) -> None:
        """A node that had no power, which its administrator calls down: Slurm asks a node only now and then."""
        self.ctl.run("scontrol", "update", f"nodename={name}", "state=down", "reason=no power")
        self.nodes[name].power_on()
        self.boot(self.nodes[name])

    def _start(self, host: Host, daemon: str) -> None:
        log = self._folder / f"{daemon}-{host.name}.log"
        self._daemons[host.name, daemon] = host.start(daemon, "-D", log=log)

    def stop_controller(self) -> None:
        """kill -9 of slurmctld, as far as anybody else can see."""
        self.ctl.run("pkill", "-9", "-x", "slurmctld")  # in the host's own pid namespace
        self._daemons["ctl", "slurmctld"].wait()

    def start_controller(self) -> None:
        self._start(self.ctl, "slurmctld")

    def until_idle(self) -> None:
        """Waits until all nodes take jobs."""
        wait_until(
            lambda: self.ctl.run("sinfo", "-h", "-N", "-o", "%T", code=None).split(),
            lambda: self.ctl.run("scontrol", "show", "nodes", code=None),
            fits=lambda states: states == ["idle"] * len(self.nodes),
        )

    def __enter__(self) -> Self:
        self.until_idle()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.hosts.__exit__(kind, error, at)


if __name__ == "__main__":
    if not obstacle():
        root_with(PACKAGES)  # here, where there is a network
    sys.exit(main(sys.argv[1:]))
