"""Is what pip installed whole? `python -I check_install.py native|reference`, in an environment with Rhizome alone."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib import metadata

PACKAGES = {"deploy", "kv_events", "radix", "rhizome", "router", "worker"}
SUFFIXES = {".py", ".pyi", ".typed", ".pyc"}  # and the extension; no C++, no .proto
EXTRAS = {"torch", "safetensors", "xxhash", "ray"}  # not there without the extras "worker" and "ray"


def main(backend: str) -> None:
    """Raise AssertionError for a file too many or too few, a missing dependency, or another backend."""
    files = [file for file in metadata.files("rhizome") or () if file.parts[0] in PACKAGES]
    assert {file.parts[0] for file in files} == PACKAGES
    extensions = [str(file) for file in files if file.suffix not in SUFFIXES]
    assert all(file.startswith("radix/_native.") for file in extensions), extensions
    assert len(extensions) == (backend == "native"), extensions

    import radix

    assert backend == radix.BACKEND, radix.BACKEND_REASON
    packages = [importlib.import_module(package) for package in sorted(PACKAGES)]
    names = [
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None)
    ]
    missing = set()
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing.add(error.name)
    assert missing <= EXTRAS, missing
    print(f"{len(names)} modules import, radix is {backend}; not there: {', '.join(map(str, missing)) or 'nothing'}")


if __name__ == "__main__":
    main(sys.argv[1])
