"""Reading a file of settings, which may be a pipe."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sae_granary.common.files import NO_WAIT, PLAIN
from sae_granary.common.quantities import byte_size


def read_text_or_pipe(path: Path, max_bytes: int) -> str:
    """The UTF-8 text of a file, or of a pipe (`<(command)`).

    Raises OSError for a folder, a pipe without a writer (which is not waited for) and what is longer, and
    UnicodeDecodeError.
    """
    fd = os.open(path, os.O_RDONLY | NO_WAIT | PLAIN)
    is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
    if NO_WAIT:
        os.set_blocking(fd, True)
    with os.fdopen(fd, "rb") as file:
        data = file.read(max_bytes + 1)
    if is_pipe and not data:
        raise OSError(errno.EPIPE, "a pipe that nothing is written to, expected a file", str(path))
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"longer than {byte_size(max_bytes)}", str(path))
    return data.decode("utf-8")
