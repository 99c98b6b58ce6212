"""Arrays that may be larger than the memory."""

import os
import tempfile
from pathlib import Path

import numpy as np

IN_MEMORY = 256 << 20  # bytes up to which an array is in memory
FOLDER = Path("/var/tmp")  # on disk, where /tmp may be in memory


def scratch_array(shape: tuple[int, ...], dtype: type = np.float64) -> np.ndarray:
    """An array of zeros; a large one is memory-mapped to a temporary file, which ends with it.

    So the system writes it to disk when memory is short. Without room on the disk it is in memory.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=FOLDER if os.access(FOLDER, os.W_OK) else None) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and would be a crash later
            return np.memmap(file, dtype, "r+", shape=shape).view(np.ndarray)
    except (OSError, AttributeError):  # AttributeError on macOS and Windows
        return np.zeros(shape, dtype)
