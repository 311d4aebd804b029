"""A Kubernetes cluster on hosts of the lab: a real control plane, and a real kubelet with Docker on each host.

    with Hosts(root_with(PACKAGES), NODES, folder) as hosts, ControlPlane(binaries(), hosts, folder) as cluster:
        cluster.kubectl("get", "pods")

The control plane runs beside the test, at 10.77.0.1. Pods of all hosts reach each other. Images are empty: what they
would hold comes from the host (filled_runc.py). Each node has two GPUs, which nothing but the scheduler looks at.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.lab.hosts import HERE, ROOT, Host, Hosts
from tests.support.until import wait_until

PACKAGES = ("docker.io", "iptables", "socat", "conntrack", "kmod", "curl")
NODES = ("h1", "h2")
GPU = "nvidia.com/gpu"
GPUS = 2  # of each node
_TOKEN = "lab-admin"
_FOLDER = Path(__file__).parent
_PYTHON = str(ROOT / ".venv/bin/python")
# Its images: what each runs.
IMAGES = {
    "lab/pause:1": ["/usr/bin/sh", "-c", "trap exit TERM; sleep infinity & wait"],
    "lab/replica-cpu:1": [_PYTHON, "-m", "tests.lab.kubernetes.stand_in"],
    "lab/balancer:1": [_PYTHON, "-m", "balancer"],
    "lab/controller:1": [_PYTHON, "-m", "balancer.cli"],
}
# Seconds after which a node that says nothing counts as lost; 40 by default.
GRACE = 12


def binaries() -> Path | None:
    """Where build.sh has put Kubernetes' programs; None if it has not run here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundserve/kubernetes-1.20.2"
    return cache / "bin" if (cache / "complete").exists() else None


class ControlPlane:
    """The cluster; its programs' logs lie in `folder`."""

    def __init__(self, programs: Path, hosts: Hosts, folder: Path) -> None:
        self.programs = programs
        self._hosts = hosts
        self._folder = folder / "kubernetes"
        self._folder.mkdir()
        self.kubeconfig = hosts.shared / "kubeconfig"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.api = httpx.Client(
            base_url=f"https://{HERE}:6443", headers={"Authorization": f"Bearer {_TOKEN}"}, verify=False, timeout=20
        )

    def __enter__(self) -> Self:
        self._write_files()
        self.start("etcd")
        self.start_api()
        self.start("kube-controller-manager")
        self.start("kube-scheduler")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.api.close()
        for name in list(self._running):
            self.kill(name)

    def start_api(self) -> None:
        """Starts the API server, and returns when it answers."""
        self.start("kube-apiserver")
        wait_until(self._is_well, fits=bool, within=180)

    def _is_well(self) -> bool:
        try:
            return self.api.get("/readyz").is_success
        except httpx.HTTPError:
            return False

    def start(self, name: str) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [str(self.programs / name), *self._flags(name)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """As by kill -9."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def kubectl(self, *words: str, code: int = 0) -> str:
        """What it prints, also about an error that is asked for; asserts its exit code."""
        command = [str(self.programs / "kubectl"), f"--kubeconfig={self.kubeconfig}", *words]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == code, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr if code else done.stdout

    def pods(self, component: str) -> list[dict[str, Any]]:
        """The pods of this part of any service."""
        selector = f"app.kubernetes.io/component={component}"
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return found

    def host(self, node: str) -> Host:
        return self._hosts[node]

    def join(self, name: str) -> None:
        """Makes a node of a host: Docker with the images, a kubelet, and routes to the others' pods."""
        host = self._hosts[name]
        number = int(host.address.rpartition(".")[2])
        host.write("/etc/lab-shared", f"{ROOT}\n{sys.base_prefix}\n")
        python = f"#!{sys.base_prefix}/bin/python3\n"
        host.write("/usr/local/sbin/filled-runc", python + (_FOLDER / "filled_runc.py").read_text(), 0o755)
        settings = {
            "bip": f"10.88.{number}.1/24",
            "iptables": False,
            "ip-masq": False,
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "runtimes": {"filled": {"path": "/usr/local/sbin/filled-runc"}},
            "default-runtime": "filled",
            "log-opts": {"max-size": "10m"},
        }
        host.write("/etc/docker/daemon.json", json.dumps(settings))
        host.run("sh", "-ec", _MOUNTS)
        host.start("dockerd", log=self._folder / f"{name}-dockerd.log")
        wait_until(
            lambda: host.run("docker", "info", code=None), fits=lambda said: "Server Version" in said, within=120
        )
        self._import(host)
        for other in (other for other in NODES if other != name):
            there = self._hosts[other].address
            host.run("ip", "route", "add", f"10.88.{there.rpartition('.')[2]}.0/24", "via", there)
        subprocess.run(["ip", "route", "replace", f"10.88.{number}.0/24", "via", host.address], check=True)
        # What kube-proxy would do for the one Service that pods of ours use.
        rule = f"iptables -t nat -A PREROUTING -d 10.96.0.1 -p tcp --dport 443 -j DNAT --to {HERE}:6443"
        host.run(*rule.split())
        host.write("/etc/kubelet.json", json.dumps(_KUBELET))
        kubelet = [
            *("--kubeconfig", str(self.kubeconfig), "--config", "/etc/kubelet.json"),
            *("--hostname-override", name, "--node-ip", host.address),
            *("--pod-infra-container-image", "lab/pause:1", "--root-dir", "/var/lib/kubelet"),
        ]
        for program in ("kubelet", "kubectl"):  # kubectl for the controller in its pod, as its command is for people
            host.write(f"/usr/local/bin/{program}", (self.programs / program).read_bytes(), 0o755)
        host.write("/usr/local/bin/groundserve", f'#!/bin/sh\nexec {_PYTHON} -m balancer.cli "$@"\n', 0o755)
        host.start("kubelet", *kubelet, log=self._folder / f"{name}-kubelet.log")

    def wait_for(self, *names: str) -> None:
        """Returns when these nodes are ready, each with its GPUs."""
        for name in names:
            wait_until(lambda name=name: self._is_ready(name), fits=bool, within=300)  # type: ignore[misc]
            patch = [{"op": "add", "path": f"/status/capacity/{GPU.replace('/', '~1')}", "value": str(GPUS)}]
            answer = self.api.patch(
                f"/api/v1/nodes/{name}/status",
                content=json.dumps(patch),
                headers={"Content-Type": "application/json-patch+json"},
            )
            assert answer.is_success, answer.text

    def _is_ready(self, name: str) -> bool:
        answer = self.api.get(f"/api/v1/nodes/{name}")
        conditions = answer.json().get("status", {}).get("conditions", []) if answer.is_success else []
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def _import(self, host: Host) -> None:
        for image, command in IMAGES.items():
            changes = [f"ENTRYPOINT {json.dumps(command)}", f"WORKDIR {ROOT}"]
            flags = " ".join(f"--change '{change}'" for change in changes)
            host.run("sh", "-ec", f"tar -C /var/empty-image -c . | docker import {flags} - {image}")

    def _write_files(self) -> None:
        subprocess.run(
            ["openssl", "genrsa", "-out", str(self._folder / "sa.key"), "2048"], check=True, capture_output=True
        )
        public = ["openssl", "rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"]
        subprocess.run(public, check=True, capture_output=True, cwd=self._folder)
        (self._folder / "tokens.csv").write_text(f'{_TOKEN},admin,admin,"system:masters"\n')
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "lab", "cluster": {"server": f"https://{HERE}:6443", "insecure-skip-tls-verify": True}}
            ],
            "users": [{"name": "admin", "user": {"token": _TOKEN}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "admin"}}],
            "current-context": "lab",
        }
        self.kubeconfig.write_text(json.dumps(config))
        self.kubeconfig.chmod(0o600)

    def _flags(self, name: str) -> Sequence[str]:
        folder, config = self._folder, f"--kubeconfig={self.kubeconfig}"
        match name:
            case "etcd":
                client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
                urls = [f"--listen-client-urls={client}", f"--advertise-client-urls={client}"]
                return [f"--data-dir={folder}/etcd", *urls, f"--listen-peer-urls={peer}", "--unsafe-no-fsync"]
            case "kube-apiserver":
                return [
                    "--etcd-servers=http://127.0.0.1:2379",
                    f"--cert-dir={folder}/certs",
                    "--service-account-issuer=https://kubernetes.default.svc",
                    f"--service-account-signing-key-file={folder}/sa.key",
                    f"--service-account-key-file={folder}/sa.pub",
                    "--service-cluster-ip-range=10.96.0.0/16",
                    "--authorization-mode=Node,RBAC",
                    f"--token-auth-file={folder}/tokens.csv",
                    f"--bind-address={HERE}",
                    f"--advertise-address={HERE}",
                    "--secure-port=6443",
                    "--allow-privileged=true",
                    "--kubelet-preferred-address-types=InternalIP",
                ]
            case "kube-controller-manager":
                return [
                    config,
                    "--leader-elect=false",
                    "--port=0",
                    f"--service-account-private-key-file={folder}/sa.key",
                    f"--root-ca-file={folder}/certs/apiserver.crt",
                    f"--node-monitor-grace-period={GRACE}s",
                    "--node-monitor-period=2s",
                    "--use-service-account-credentials=false",
                ]
            case _:
                return [config, "--leader-elect=false", "--port=0"]


# Docker wants its control groups, a place that is no overlay, and mounts that it may pass on.
_MOUNTS = """
mount --make-rshared /
mkdir -p /var/empty-image/tmp /var/lib/docker /var/lib/kubelet
echo "no image may be of size 0" >/var/empty-image/empty
mount -t tmpfs docker /var/lib/docker
mount -t tmpfs kubelet /var/lib/kubelet
mount --make-rshared /var/lib/kubelet
mount -t tmpfs cgroup /sys/fs/cgroup
for group in $(awk '$4 == 1 && NR > 1 {print $1}' /proc/cgroups); do
    mkdir -p /sys/fs/cgroup/$group
    mount -t cgroup -o $group cgroup /sys/fs/cgroup/$group 2>/dev/null || rmdir /sys/fs/cgroup/$group
done
echo 1 >/proc/sys/net/ipv4/ip_forward
[ -e /dev/kmsg ] || mknod -m 600 /dev/kmsg c 1 11
# A kubelet sets these for the whole machine, unless they are so already: let it find them so.
while read -r value file; do
    echo "$value" >"/run/$(basename "$file")"
    mount --bind "/run/$(basename "$file")" "/proc/sys/$file"
done <<END
1 vm/overcommit_memory
0 vm/panic_on_oom
10 kernel/panic
1 kernel/panic_on_oops
1000000 kernel/keys/root_maxkeys
25000000 kernel/keys/root_maxbytes
END
"""
_KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "cgroupDriver": "cgroupfs",
    "cgroupsPerQOS": False,
    "enforceNodeAllocatable": [],
    "failSwapOn": False,
    "resolvConf": "",
    "nodeStatusUpdateFrequency": "3s",
    "nodeStatusReportFrequency": "3s",
    "syncFrequency": "5s",
    "evictionHard": {"memory.available": "10Mi"},
    "imageGCHighThresholdPercent": 100,
    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
    "authorization": {"mode": "AlwaysAllow"},
    "serverTLSBootstrap": False,
}
