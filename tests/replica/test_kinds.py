"""SkyPilot's names of GPUs against NVIDIA's own, as nvidia-smi prints them."""

import pytest

from replica.kinds import is_of_kind

# What nvidia-smi calls it, its memory in MiB; kinds that it is, and kinds that it is not.
TABLE = [
    (
        "NVIDIA GeForce RTX 4090",
        24564,
        "RTX4090 rtx4090 RTX-4090 4090 24GB 24GB+ 16GB+",
        "RTX4080 RTX4090-D RTX3090 80GB+",
    ),
    ("NVIDIA GeForce RTX 4090 D", 24564, "RTX4090D RTX4090-D", "RTX4090"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "RTX4090-Laptop 16GB", "RTX4090"),
    ("NVIDIA GeForce RTX 4080 SUPER", 16376, "RTX4080SUPER RTX4080-SUPER", "RTX4080"),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 16376, "RTX4070TiSUPER RTX4070-Ti-SUPER", "RTX4070 RTX4070Ti"),
    ("NVIDIA GeForce RTX 3090", 24576, "RTX3090", "RTX3090Ti RTX3090-Ti"),
    ("NVIDIA GeForce RTX 3090 Ti", 24564, "RTX3090Ti RTX3090-Ti", "RTX3090"),
    ("NVIDIA GeForce RTX 5090", 32607, "RTX5090 32GB+", "RTX5080"),
    ("NVIDIA GeForce GTX 1080 Ti", 11264, "GTX1080Ti", "GTX1080"),
    ("NVIDIA RTX A6000", 49140, "RTXA6000 RTX-A6000 A6000 48GB", "RTX6000 RTX6000-Ada"),
    ("NVIDIA RTX A4000", 16376, "RTXA4000 A4000", "RTX4000 RTX4000-Ada"),
    ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX6000-Ada RTX6000Ada rtx6000-ada", "RTX6000 RTXA6000 RTXPRO6000"),
    ("NVIDIA RTX 4000 SFF Ada Generation", 20475, "RTX4000-Ada-SFF", "RTX4000-Ada RTX4000"),
    ("NVIDIA RTX 4000 Ada Generation", 20475, "RTX4000-Ada", "RTX4000-Ada-SFF RTX4000"),
    ("Quadro RTX 6000", 24576, "RTX6000 RTX-6000", "RTX6000-Ada RTXPRO6000"),
    ("Quadro RTX 8000", 49152, "RTX8000", "RTX6000"),
    (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        97887,
        "RTXPRO6000 RTXPro6000 RTX-PRO-6000 RTXPRO6000-SE",
        "RTX6000",
    ),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887, "RTXPRO6000 RTXPRO6000-WK", "RTXPRO6000-MaxQ RTX6000"),
    ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887, "RTXPRO6000 RTXPRO6000-MaxQ", "RTXPRO6000-SE"),
    ("NVIDIA RTX PRO 4500 Blackwell", 32623, "RTXPRO4500", "RTXPRO6000 RTX4500"),
    (
        "NVIDIA A100-SXM4-80GB",
        81920,
        "A100 A100-80GB a100-80gb A100-80G A100-80GB-SXM A100-SXM4-80GB",
        "A100-40GB A100-PCIe A10",
    ),
    ("NVIDIA A100 80GB PCIe", 81920, "A100 A100-80GB A100-PCIe", "A100-40GB A100-SXM"),
    ("NVIDIA A100-SXM4-40GB", 40960, "A100 A100-40GB 40GB", "A100-80GB H100"),
    ("A100-PCIE-40GB", 40960, "A100", "A100-80GB"),
    ("NVIDIA A10G", 23028, "A10G 24GB", "A10 A100"),
    ("NVIDIA A10", 23028, "A10", "A10G A100"),
    ("NVIDIA A40", 46068, "A40 48GB", "A4000"),
    ("NVIDIA L4", 23034, "L4 NVIDIA-L4 24GB+ nvidia:24GB+ nvidia:24GB", "L40 L40S"),
    ("NVIDIA L40", 46068, "L40", "L4 L40S"),
    ("NVIDIA L40S", 46068, "L40S", "L40 L4"),
    (
        "NVIDIA H100 80GB HBM3",
        81559,
        "H100 H100-80GB H100-SXM H100-MEGA H100-MEGA-80GB",
        "H100-PCIe H100-NVL H200 GH200",
    ),
    ("NVIDIA H100 PCIe", 81559, "H100 H100-80GB H100-PCIe", "H100-NVL H100-SXM"),
    ("NVIDIA H100 NVL", 95830, "H100 H100-NVL", "H100-80GB H100-SXM"),
    ("NVIDIA H200", 143771, "H200 H200-SXM H200-141GB 141GB 80GB+", "H100 GH200 H200-NVL"),
    ("NVIDIA GH200 480GB", 97871, "GH200 GH200-480GB 96GB", "H200 H100"),
    ("NVIDIA B200", 183359, "B200 B200-SXM", "GB200 B300"),
    ("NVIDIA GB200", 189471, "GB200", "B200"),
    ("Tesla T4", 15360, "T4 Tesla-T4 16GB 16GB+", "T4g 24GB+"),
    ("NVIDIA T4G", 15360, "T4g", "T4"),
    ("Tesla V100-SXM2-16GB", 16160, "V100 V100-16GB V100-SXM2", "V100-32GB P100"),
    ("Tesla V100-SXM2-32GB", 32510, "V100 V100-32GB V100-32G", "V100-16GB"),
    ("Tesla P100-PCIE-16GB", 16280, "P100", "P40 P4"),
    ("Tesla K80", 11441, "K80", "T4"),
    ("pretended GPU", 81920, "80GB", "L4"),
]


@pytest.mark.parametrize(("name", "memory", "same", "other"), TABLE, ids=[row[0] for row in TABLE])
def test_each_gpu_is_known_by_sky_pilots_names_and_by_no_other(name: str, memory: int, same: str, other: str) -> None:
    assert [kind for kind in same.split() if not is_of_kind(name, kind, memory)] == []
    assert [kind for kind in other.split() if is_of_kind(name, kind, memory)] == []


@pytest.mark.parametrize(
    ("name", "kind", "is_one"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80GB", True),
        ("NVIDIA A100-SXM4-40GB", "A100-80GB", False),
        ("NVIDIA H100 PCIe", "H100-80GB", True),
        ("NVIDIA A100-SXM4-80GB", "40GB+", True),
        ("NVIDIA L4", "24GB+", False),
        ("NVIDIA L4", "", False),
        ("NVIDIA L4", "-", False),
    ],
)
def test_where_nobody_knows_its_memory_the_name_decides(name: str, kind: str, is_one: bool) -> None:
    assert is_of_kind(name, kind) is is_one
