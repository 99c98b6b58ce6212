"""Find the credentials that Kaggle's client will use, without importing it: it signs in when it is imported."""

import codecs
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from kernel.inputs import InputError

TOKENS = "https://www.kaggle.com/settings/api"


class NoCredentials(InputError):
    """The user has none."""


@dataclass(frozen=True)
class Credentials:
    """A user's Kaggle credentials.

    Attributes:
        source: where they were found: a file or environment variables.
        owner: the user's Kaggle name; None for a token, whose owner only Kaggle knows.
        secrets: what must never be sent in a file, or printed.
    """

    source: str
    owner: str | None
    secrets: tuple[str, ...] = field(repr=False)


def find_credentials() -> Credentials:
    """The credentials that Kaggle's client will use, in its order of precedence.

    Raises:
        NoCredentials: there are none.
        InputError: the client cannot read the file that contains them.
    """
    home = Path.home() / ".kaggle"
    token = os.environ.get("KAGGLE_API_TOKEN", "")
    if token:
        is_file = len(token) < 4096 and Path(token).is_file()
        return Credentials("KAGGLE_API_TOKEN", None, (read_secret(Path(token)) if is_file else token,))
    for path in (home / "access_token", home / "access_token.txt"):
        if secret := read_secret(path):
            return Credentials(str(path), None, (secret,))
    owner, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
    if owner and key:
        return Credentials("KAGGLE_USERNAME and KAGGLE_KEY", owner, (key,))
    for folder in (Path(os.environ.get("KAGGLE_CONFIG_DIR") or home), Path.home() / ".config" / "kaggle"):
        path = folder / "kaggle.json"
        if not (secret := read_secret(path)):
            continue
        try:
            content = json.loads(secret)
            return Credentials(str(path), str(content["username"]), (str(content["key"]),))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read as JSON with a username and a key: make a new one at {TOKENS}"
            ) from error
    if read_secret(home / "credentials.json"):
        return Credentials(str(home / "credentials.json"), None, ())
    raise NoCredentials(f"no Kaggle credentials: make a token at {TOKENS} and put it into {home / 'access_token'}")


def find_owner() -> str | None:
    """The user's Kaggle name, if it is known without signing in."""
    try:
        owner = find_credentials().owner
    except InputError:  # bundling needs no credentials; publishing reports what is wrong with them
        owner = None
    return owner or os.environ.get("KAGGLE_USERNAME") or None


def read_secret(path: Path) -> str:
    """The content of a file of credentials; an empty string if there is no file.

    Raises:
        InputError: Kaggle's client could not read the file. It would call it absent, or end with a traceback.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it a file that you may read") from error
    if encoding := unsupported_encoding(content):
        raise InputError(
            f"{path} is {encoding}, which Kaggle's client cannot read: save it as UTF-8 without a byte order mark"
        )
    return content.decode("utf-8").strip()


def unsupported_encoding(content: bytes) -> str:
    """A description of the encoding of a text that is not plain UTF-8; an empty string if it is."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32 text"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        return "UTF-16 text"
    if content.startswith(codecs.BOM_UTF8):
        return "UTF-8 text with a byte order mark"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return ""
