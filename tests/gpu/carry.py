"""python3 -m tests.gpu.carry --out FOLDER: SGLang, and smg beside it, for a GPU machine that reaches no registry.

Two archives, `site.tar.xz` and `smg.tar.xz`, for a machine that has Python 3.12, torch 2.11 for CUDA 13 and what is in
THERE, and a GPU of compute capability 9.0. Unpacked, with the variables of ENVIRON and the flags of FLAGS, the
folders on PYTHONPATH are enough for `python3 -m tests.gpu`. What SGLang 0.5.23 would want beyond that is either cut
off, or stands in as a package that only fails when it is used: FlashInfer, IPython, CUTLASS' kernels for Blackwell.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = ("replica/requirements-cpu.lock", "balancer/requirements.lock")
# Pinned in those locks and left out, as the machine has them in a version that does or as nothing here needs them.
THERE = """
accelerate aiohappyeyeballs aiohttp aiosignal asttokens attrs certifi charset-normalizer einops executing filelock
frozenlist fsspec hf-xet idna ipython ipython-pygments-lexers jedi jinja2 markupsafe matplotlib-inline mpmath multidict
networkx numpy packaging parso pexpect pillow prompt-toolkit propcache psutil ptyprocess pure-eval pygments
pyyaml regex requests safetensors scipy sentencepiece setuptools stack-data sympy torchvision tqdm triton urllib3
watchfiles wcwidth yarl
"""
KERNEL = "sglang-kernel==0.4.10"
# The last whose library loads with torch 2.11; the Python around it is that of KERNEL, which SGLang asks for.
KERNEL_LIBRARY = "sglang-kernel==0.4.5"
SAVER = "torch-memory-saver==0.0.10"
SMG = "tests/bench/pins/smg.txt"
SMG_THERE = ("grpcio==", "protobuf==", "PyYAML==", "setproctitle==", "typing_extensions==")
# Which builds the machine can load.
PLATFORMS = ("manylinux1", "manylinux2014", *(f"manylinux_2_{n}" for n in (17, 24, 26, 27, 28, 31, 34, 35)))
# Of the wheels' files: other programs of SGLang's, and libraries that nothing here calls.
LEFT_OUT = re.compile(
    r"sglang/(test|multimodal_gen|benchmark|srt/rust_extensions)/.*|sglang/srt/mem_cache/rust_tree_core/.*\.so"
    r"|sgl_kernel/.*\.so|torch_memory_saver_hook_mode_\w+_cu12\.abi3\.so"
    r"|torch_memory_saver_hook_mode_(preload|torch)\.abi3\.so"
)
FLASHINFER = '''
"""Stands in for FlashInfer: names can be imported, and fail when they are called."""

import importlib.abc
import importlib.machinery
import sys
import types

USED_IF_THERE = ("flashinfer.norm", "flashinfer.activation", "flashinfer.rope")


class Absent:
    def __init__(self, *args, **more):
        raise NotImplementedError("FlashInfer is not installed")


class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Absent,), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if not name.startswith("flashinfer."):
            return None
        if name.startswith(USED_IF_THERE):
            raise ModuleNotFoundError(name, name=name)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
sys.modules[__name__].__class__ = Module
'''
IPYTHON = {
    "IPython/__init__.py": "",
    "IPython/display.py": "class HTML:\n    def __init__(self, *args, **more):\n        pass\n\n\ndisplay = print\n",
}
DUAL_GEMM = (
    "sglang/srt/layers/dual_gemm.py",
    "        if not is_cuda():\n            return None\n",
    "        return None\n",
)
ENVIRON = {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"}
FLAGS = "--attention-backend triton --sampling-backend pytorch"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.carry", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--wheels", type=Path, help="folder in which downloads are kept (none)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        work = Path(folder)
        wheels = options.wheels or work / "wheels"
        for name, make in (("site", site), ("smg", smg)):
            make(wheels, work / name)
            pack(work / name, options.out / f"{name}.tar.xz")
            print(f"{options.out / name}.tar.xz: {(options.out / f'{name}.tar.xz').stat().st_size / 2**20:.1f} MiB")
    print(f"there: PYTHONPATH={{site}}:{{smg}}:{{repository}} {' '.join(f'{k}={v}' for k, v in ENVIRON.items())}")
    print(f'python3 -m tests.gpu --flags="{FLAGS}" ...')
    return 0


def site(wheels: Path, out: Path) -> None:
    """SGLang and what it needs, in the folder `out`."""
    unpack(download(pins(), wheels / "pinned"), out)
    (library,) = download([KERNEL_LIBRARY], wheels / "library")
    with zipfile.ZipFile(library) as wheel:
        wheel.extract("sgl_kernel/sm90/common_ops.abi3.so", out)
    (out / "flashinfer").mkdir()
    (out / "flashinfer/__init__.py").write_text(FLASHINFER.lstrip())
    for name, text in IPYTHON.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    path, before, after = DUAL_GEMM
    source = (out / path).read_text()
    if source.count(before) != 1:
        raise RuntimeError(f"{path} is not as it was in sglang 0.5.23")
    (out / path).write_text(source.replace(before, after))
    entry_points(out)


def smg(wheels: Path, out: Path) -> None:
    """smg of the version that `make bench` pins, its library without symbols, in the folder `out`."""
    wanted = [line for line in (ROOT / SMG).read_text().split() if "==" in line and not line.startswith(SMG_THERE)]
    unpack(download(wanted, wheels / "smg"), out)
    shutil.rmtree(next(out.glob("smg-*.dist-info/sboms")), ignore_errors=True)
    subprocess.run(["strip", str(out / "smg/smg_rs.abi3.so")], check=True)


def pins() -> list[str]:
    """`name==version` of all that travels."""
    found = {
        line.split()[0] for lock in LOCKS for line in (ROOT / lock).read_text().splitlines() if re.match(r"\S+==", line)
    }
    return [*sorted(pin for pin in found if pin.partition("==")[0] not in THERE.split()), KERNEL, SAVER]


def download(wanted: Iterable[str], folder: Path) -> list[Path]:
    """The wheels of those for Python 3.12 on the machine, in `folder`, which is kept as it is if it exists."""
    if not folder.is_dir():
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        argv += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
        argv += [part for abi in ("cp312", "abi3", "none") for part in ("--abi", abi)]
        argv += [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
        subprocess.run([*argv, *wanted], check=True)
    return sorted(folder.glob("*.whl"))


def unpack(wheels: Iterable[Path], out: Path) -> None:
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(out, [name for name in wheel.namelist() if not LEFT_OUT.fullmatch(name)])


def entry_points(out: Path) -> None:
    """groundserve as an installed package, so that SGLang finds its plug-in; the code is the repository's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = out / f"groundserve-{project.get('version', '0')}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: groundserve\nVersion: {project.get('version', '0')}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {what}" for name, what in entries.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


def pack(folder: Path, archive: Path) -> None:
    # A dictionary as large as the largest library: preset 4 with it comes close to preset 9, in a third of the time.
    tar = subprocess.Popen(["tar", "-C", str(folder), "--sort=name", "-c", "."], stdout=subprocess.PIPE)
    with archive.open("wb") as out:
        subprocess.run(["xz", "--lzma2=preset=4,dict=64MiB", "-c"], stdin=tar.stdout, stdout=out, check=True)
    if tar.wait():
        raise RuntimeError(f"tar could not read all of {folder}")


if __name__ == "__main__":
    sys.exit(main())
