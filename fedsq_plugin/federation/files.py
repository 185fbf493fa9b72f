"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError


def atomic_write(path: str | os.PathLike[str], content: bytes | Callable[[Path], object], *, new: bool = False) -> None:
    """Write `path` whole or not at all: `content`, or whatever `content(temporary path)` writes.

    The temporary name does not keep the suffix, so a writer that guesses the format from the name has to be told it.

    Args:
        new: nobody may have written it before, nor do so at the same moment.

    Raises:
        FileExistsError: with `new`, it is there.
        ConfigError: the place cannot be written. Other errors of the writer pass through.
    """
    target = Path(path)
    # Not tempfile: its files are readable by their owner alone, and results are there to share.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if new:
            _place(temporary, target)
        else:
            os.replace(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _place(temporary: Path, target: Path) -> None:
    """Give a whole file its name, unless it is taken."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the name is taken first, and its content follows
        os.close(os.open(target, os.O_CREAT | os.O_EXCL))
        os.replace(temporary, target)
