"""Which tokenizer a model card means: a digest over the files that a worker sends and a router reads."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def tokenizer_sha256(files: Mapping[str, bytes]) -> str:
    """One hex digest over name and data of each file, by name, each after its length: equal digests, equal files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        for part in (name.encode(), files[name]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()
