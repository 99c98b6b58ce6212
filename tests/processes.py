"""Run the repository's commands as a user would, without importing torch and timm for each of them.

These imports take longer than most of what the tests run. A process that has done nothing else is kept, and each
command runs in a fork of it.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
FORKS.set_forkserver_preload(["torch", "timm", "open_clip", "pandas", "sklearn.linear_model", "matplotlib.figure"])


def command(*arguments: object, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    """Run Python with some arguments in a process of its own.

    With options of Python's own or of `subprocess.run`, such as an environment, that process is a new one.
    """
    argv = list(map(str, arguments))
    if options or argv[0].startswith("-"):
        return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, "stdout"), Path(folder, "stderr")]
        process = FORKS.Process(target=_run_script, args=(argv, cwd, dict(os.environ), files))
        process.start()
        process.join()
        return subprocess.CompletedProcess(argv, process.exitcode, *(file.read_text("utf-8") for file in files))


def _run_script(argv: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    """Be `python argv` in another folder and environment, with stdout and stderr in files."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # a forked process runs none by itself
        sys.stdout.flush()
        sys.stderr.flush()
