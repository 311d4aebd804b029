"""The proof on an NVIDIA GPU: `python3 -m tests.gpu` on a machine that has one."""
