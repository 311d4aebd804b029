"""Names that say that their value is a secret, as HF_TOKEN does; SkyServe's examples give those as plain variables."""

import re

_SECRET = re.compile(r"(.*_)?(API)?(KEYS?|PASSWORD|PASSPHRASE|SECRET|TOKEN)", re.IGNORECASE)


def is_secret(name: str) -> bool:
    return _SECRET.fullmatch(name) is not None
