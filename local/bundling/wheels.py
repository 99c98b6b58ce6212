"""Make the wheels that travel with the weights, from what is installed here: no package index is needed."""

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
from kernel.manifest import Weights
from local.base.kaggle_image import IMAGE, is_newer

# What installers write beside the files of a wheel.
INSTALLERS_OWN = frozenset(
    ("INSTALLER", "REQUESTED", "RECORD", "RECORD.jws", "RECORD.p7s", "direct_url.json", "provenance_url.json",
     "uv_build.json", "uv_cache.json")
)  # fmt: skip
COMPILED = (".so", ".pyd", ".dll", ".dylib")


def needed_wheels(runs: Sequence[Weights]) -> dict[str, str]:
    """Name and version of each library that some runs need and that Kaggle's image has not, or only an older one of.

    Raises:
        InputError: two runs need different versions of one library.
    """
    needed: dict[str, tuple[str, Path]] = {}
    for run in runs:
        for member in run.manifest.members:
            encoder, timm = member.encoder, member.versions["timm"]
            libraries = dict(encoder.packages) if encoder.library != "timm" else {}
            if is_newer(timm, IMAGE["timm"]):
                libraries["timm"] = timm
            for name, version in libraries.items():
                known, first = needed.setdefault(name, (version, run.folder))
                if known != version:
                    raise InputError(
                        f"{first} was trained with {name} {known} and {run.folder} with {version}, and a kernel can "
                        "have only one of them: train both with the same"
                    )
    return {name: version for name, (version, _) in sorted(needed.items())}


def make_wheel(name: str, version: str, folder: Path) -> Path:
    """Write the wheel of an installed pure-Python library; the same files give the same bytes.

    Args:
        version: what must be installed.

    Raises:
        InputError: another version is installed, or none, or it cannot be made into a wheel.
    """
    again = f"pip install {name}=={version}, or train again"
    try:
        installed = distribution(name)
    except PackageNotFoundError as error:
        raise InputError(f"the run was trained with {name} {version}, which is not installed: {again}") from error
    if installed.version != version:
        raise InputError(f"the run was trained with {name} {version}, here is {installed.version}: {again}")
    contents = read_files(installed, name, again)
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


def read_files(installed: Distribution, name: str, again: str) -> dict[str, bytes]:
    """The files of a library as its wheel had them, by path in alphabetical order.

    Args:
        again: what to do where it is not fit to be bundled.

    Raises:
        InputError: it is not pure Python, not installed from a wheel, or damaged.
    """
    wheel = installed.read_text("WHEEL") or ""
    if "Root-Is-Purelib: true" not in wheel or not re.search(r"^Tag: .*\bpy3-none-any\s*$", wheel, re.MULTILINE):
        raise InputError(f"{name} {installed.version} is not installed from a pure-Python wheel: {again}")
    requirement = re.search(r">=\s*([0-9.]+)", installed.metadata["Requires-Python"] or "")
    if requirement and is_newer(requirement[1], IMAGE["python"]):
        raise InputError(
            f"{name} {installed.version} needs Python {requirement[1]}, Kaggle's image has {IMAGE['python']}: "
            f"train again with an older {name}"
        )
    if json.loads(installed.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"):
        raise InputError(f"{name} {installed.version} is an editable install: {again}")
    contents = {}
    for path in sorted(installed.files or (), key=str):
        is_installers = path.parent.suffix == ".dist-info" and path.name in INSTALLERS_OWN
        if path.is_absolute() or ".." in path.parts or "__pycache__" in path.parts or is_installers:
            continue  # a script outside of site-packages, or what the installer made
        if path.suffix in COMPILED:
            raise InputError(f"{name} {installed.version} holds {path}, which is not Python: {again}")
        try:
            contents[str(path)] = Path(path.locate()).read_bytes()
        except OSError as error:
            raise InputError(
                f"{name} {installed.version} is damaged here ({path}: {error.strerror}): "
                f"pip install --force-reinstall --no-deps {name}=={installed.version}"
            ) from error
    for suffix in (".py", ".dist-info/WHEEL"):
        if not any(path.endswith(suffix) for path in contents):
            raise InputError(f"{name} {installed.version} has no {suffix} file in site-packages: {again}")
    return contents


def make_record(contents: dict[str, bytes], own: str) -> bytes:
    """The RECORD of a wheel: path, SHA-256 and size of every file, and its own path without them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for path, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((path, f"sha256={digest}", len(content)))
    writer.writerow((own, "", ""))
    return text.getvalue().encode()
