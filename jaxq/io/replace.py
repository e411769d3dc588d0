"""Files written beside the one they replace, so that a full disk, a crash or a lost cable costs nothing.

The old file stays what it was until the new one is complete and on the disk; then a rename puts it in place, which
readers see as a whole or not at all.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxq.io.errors import FileError


@contextlib.contextmanager
def beside(path: Path) -> Iterator[BinaryIO]:
    """Open a new file in the folder of `path`, which is gone after the block unless `publish` gave it a name.

    Raises `FileError` for whatever the operating system refuses.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(path, f"cannot be written ({reason}); what was there before is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(file: BinaryIO, path: Path) -> None:
    """Put a file that `beside` opened in the place of `path`, after its bytes have reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can open folders."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
