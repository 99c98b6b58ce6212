"""Make the wheels that are bundled with the weights from installed packages; no package index is needed."""

import base64
import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, Weights

# Versions in Kaggle's image, as of August 2026. It has no open_clip_torch and no ftfy.
IMAGE = {"python": "3.12", "timm": "1.0.26"}
# Files that installers add to those of a wheel.
ADDED_BY_INSTALLERS = frozenset(
    ("INSTALLER", "REQUESTED", "RECORD", "RECORD.jws", "RECORD.p7s", "direct_url.json", "provenance_url.json",
     "uv_build.json", "uv_cache.json")
)  # fmt: skip
COMPILED = (".so", ".pyd", ".dll", ".dylib")


def is_newer(version: str, than: str) -> bool:
    """Whether a version is newer than another, by their numbers; 1.0.26.post1 counts as newer than 1.0.26."""
    one, other = ([int(number) for number in re.findall(r"\d+", text.partition("+")[0])] for text in (version, than))
    length = max(len(one), len(other))
    return one + [0] * (length - len(one)) > other + [0] * (length - len(other))


def needed_wheels(runs: Sequence[Weights]) -> dict[str, str]:
    """Name and version of each library that runs need and that Kaggle's image lacks, or has in an older version.

    Raises:
        InputError: two runs need different versions of one library.
    """
    needed: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for member in run.manifest.members:
            timm = member.versions.get("timm")
            if timm is None:
                raise InputError(f"{run.folder / MANIFEST} does not name the version of timm: train again")
            others = [encoder.packages for encoder in member.encoders if encoder.library != "timm"]
            libraries = {name: version for packages in others for name, version in packages.items()}
            if is_newer(timm, IMAGE["timm"]):
                libraries["timm"] = timm
            for name, version in libraries.items():
                known, first = needed.setdefault(name, (version, run.folder))
                if known != version:
                    raise InputError(
                        f"{first} was trained with {name} {known} and {run.folder} with {version}, but a kernel can "
                        "have only one of them: train both with the same version"
                    )
    return {name: version for name, (version, _) in sorted(needed.items())}


def make_wheel(name: str, version: str, folder: Path) -> Path:
    """Write the wheel of an installed pure-Python library; the same files give the same bytes.

    Raises:
        InputError: another version is installed, or none, or no wheel can be made of it.
    """
    fix = f"pip install {name}=={version}, or train again"
    try:
        installed = distribution(name)
    except PackageNotFoundError as error:
        raise InputError(f"the run was trained with {name} {version}, which is not installed: {fix}") from error
    if installed.version != version:
        raise InputError(f"the run was trained with {name} {version}, but {installed.version} is installed: {fix}")
    contents = read_files(installed, name, fix)
    info = next(path.rpartition("/")[0] for path in contents if path.endswith(".dist-info/WHEEL"))
    contents[f"{info}/RECORD"] = make_record(contents, f"{info}/RECORD")
    wheel = folder / f"{re.sub(r'[-_.]+', '_', name)}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in contents.items():
            entry = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o100644 << 16
            archive.writestr(entry, content)
    return wheel


def read_files(installed: Distribution, name: str, fix: str) -> dict[str, bytes]:
    """The files of an installed library as in its wheel, by path in alphabetical order.

    Raises:
        InputError: it is not pure Python, not installed from a wheel, or damaged; `fix` says what to do.
    """
    wheel = installed.read_text("WHEEL") or ""
    if "Root-Is-Purelib: true" not in wheel or not re.search(r"^Tag: .*\bpy3-none-any\s*$", wheel, re.MULTILINE):
        raise InputError(f"{name} {installed.version} is not installed from a pure-Python wheel: {fix}")
    requirement = re.search(r">=\s*([0-9.]+)", installed.metadata["Requires-Python"] or "")
    if requirement and is_newer(requirement[1], IMAGE["python"]):
        raise InputError(
            f"{name} {installed.version} needs Python {requirement[1]}, Kaggle's image has {IMAGE['python']}: "
            f"train again with an older {name}"
        )
    if json.loads(installed.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        raise InputError(f"{name} {installed.version} is an editable install: {fix}")
    contents = {}
    for path in sorted(installed.files or (), key=str):
        is_added = path.parent.suffix == ".dist-info" and path.name in ADDED_BY_INSTALLERS
        if path.is_absolute() or ".." in path.parts or "__pycache__" in path.parts or is_added:
            continue  # a script outside of site-packages, or a file of the installer
        if path.suffix in COMPILED:
            raise InputError(f"{name} {installed.version} contains {path}, which is compiled: {fix}")
        try:
            contents[str(path)] = Path(path.locate()).read_bytes()
        except OSError as error:
            raise InputError(
                f"the installed {name} {installed.version} is damaged ({path}: {error.strerror}): "
                f"pip install --force-reinstall --no-deps {name}=={installed.version}"
            ) from error
    for suffix in (".py", ".dist-info/WHEEL"):
        if not any(path.endswith(suffix) for path in contents):
            raise InputError(f"{name} {installed.version} has no {suffix} file in site-packages: {fix}")
    return contents


def make_record(contents: dict[str, bytes], record: str) -> bytes:
    """The RECORD of a wheel: path, SHA-256 and size of every file; for itself, the path `record` alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for path, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((path, f"sha256={digest}", len(content)))
    writer.writerow((record, "", ""))
    return text.getvalue().encode()
