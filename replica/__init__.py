"""The node image's program: leases GPUs, then becomes SGLang."""
