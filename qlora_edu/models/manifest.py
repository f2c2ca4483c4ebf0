"""When a cached folder is believed: its manifest lists every file with size, SHA-256 and modification time.

On each load the sizes must agree, and a file whose modification time is not the listed one is hashed again.
So an altered file is noticed, and an untouched one costs nothing. A full check hashes everything: it finds a
bad disk too.
"""

import json
from importlib.metadata import version
from pathlib import Path

from qlora_edu.models import convert
from qlora_edu.models.source import Source, sha256

MANIFEST = "qlora-edu.json"


def write(folder: Path, source: Source) -> None:
    """List the files of a finished folder in its manifest."""
    files = {}
    for file in sorted(folder.iterdir()):
        found = file.stat()
        files[file.name] = {"bytes": found.st_size, "sha256": sha256(file), "mtime_ns": found.st_mtime_ns}
    manifest = {
        "model": source.name,
        "source": source.requirement,
        "member_sha256": source.member_sha256,
        "conversion": convert.VERSION,
        "made_with": {package: version(package) for package in ("transformers", "gguf", "torch")},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def find_problem(folder: Path, source: Source, full: bool = False) -> str:
    """What is wrong with a cached folder, in words; empty where nothing is.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        made = manifest["member_sha256"], manifest["conversion"]
        files = {name: (e["bytes"], e["mtime_ns"], e["sha256"]) for name, e in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    if made != (source.member_sha256, convert.VERSION):
        return "another version of this package made it"
    # A file that does not belong there counts too: transformers acts on an adapter_config.json that it finds.
    present = {file.name for file in folder.iterdir() if not file.name.startswith(".")} - {MANIFEST}
    if present != set(files):
        return f"missing or not belonging there: {', '.join(sorted(present ^ set(files)))}"
    for name, (size, mtime, digest) in files.items():
        found = (folder / name).stat()
        if found.st_size != size:
            return f"{name} has {found.st_size:,} bytes instead of {size:,}"
        if (full or found.st_mtime_ns != mtime) and sha256(folder / name) != digest:
            return f"{name} has been altered: its SHA-256 differs"
    return ""
