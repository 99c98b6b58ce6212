"""Tables and ids, even after other programs have changed them."""

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from kernel.inputs import InputError

RESOLUTIONS = ("300p", "500p", "720p", "fullsize")  # folders of photos by their shorter side in pixels, smallest first
TAXONOMY = ("phylum", "class", "order", "family", "genus")  # ranks above the species, highest first
HIDDEN = ("__MACOSX", "@eaDir")  # left in archives by macOS and Synology; names with a leading dot are hidden too
SEPARATOR = re.compile(r'"?sep=([^"\r\n])"?[\r\n]*')  # Excel's first line of a CSV file, "sep=;"
COMMENT = re.compile(r'"?#(\s|[^",;\t]*$)')  # not the header of a column such as "#" or "#id"
csv.field_size_limit(1 << 30)  # characters of a cell; Python's own limit of 128 KiB is less than some cells have
NULLS = frozenset(("", "nan", "<na>", "none", "null", "na", "n/a"))  # what programs write for a missing value
# What people write for an unknown value.
BLANKS = NULLS | frozenset(
    ("n.a", "unknown", "unidentified", "unclassified", "undetermined", "unassigned", "not assigned", "unspecified",
     "not specified", "incertae sedis")
)  # fmt: skip


def read_table(
    path: Path, needed: Iterable[str], filled: Sequence[str] = (), left_out: Counter | None = None
) -> list[dict[str, str]]:
    """All rows of `iterate_table`."""
    return list(iterate_table(path, needed, filled, left_out))


def read_header(path: Path) -> list[str]:
    """The columns of a CSV file; none if it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, delimiter=delimiter_of(file)), [])
    except (OSError, UnicodeDecodeError, csv.Error, InputError):
        return []


def delimiter_of(file: TextIO) -> str:
    """What separates the cells of a CSV file: of comma, semicolon and tab the first that its header has.

    A line such as "sep=;" before the header decides. The file is read from its start, and stands at its header
    afterwards, behind that line and those that are blank.

    Raises:
        InputError: the header begins with "# ", or with "#" and is one cell. It may be a comment or the header.
    """
    start, header, line, declared = 0, file.readline(), 1, ""
    while header and (not header.strip() or SEPARATOR.fullmatch(header)):
        declared = "".join(SEPARATOR.findall(header)) or declared
        start, header, line = file.tell(), file.readline(), line + 1
    if COMMENT.match(header):
        raise InputError(
            f"{file.name}, line {line} begins with '#': remove the line if it is a comment, or the '#' if it is the "
            "header"
        )
    file.seek(start)
    return declared or next((sign for sign in ",;\t" if sign in header), ",")


def iterate_table(
    path: Path, needed: Iterable[str], filled: Sequence[str] = (), left_out: Counter | None = None
) -> Iterator[dict[str, str]]:
    """Read the rows of a CSV file, one after another, as dictionaries of strings.

    Args:
        needed: columns that the file must have.
        filled: columns that must not be blank; rows in which one is blank are left out.
        left_out: counts the rows that are left out, by the blank column.

    Raises:
        InputError: the file is not CSV text, or lacks a needed column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            delimiter = delimiter_of(file)
            reader = csv.DictReader(file, delimiter=delimiter)
            missing = sorted(set(needed) - set(reader.fieldnames or ()))
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise InputError(f"{path} lacks the column {missing[0]!r}: it has {found}")
            row = {}
            for row in reader:
                blank = next((column for column in filled if is_blank(row[column])), None)
                if blank is None:
                    yield row
                elif left_out is not None:
                    left_out[f"rows of {path.name} without {blank}"] += 1
            if any("\n" in str(cell) or "\r" in str(cell) for cell in row.values()):
                _refuse_open_quote(file, path, delimiter)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        advice = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise InputError(f"{path} cannot be read as CSV: {error}{advice}") from error


def _refuse_open_quote(file: TextIO, path: Path, delimiter: str) -> None:
    """Raise an InputError if the last row takes in the rest of the file because its quote is never closed."""
    file.seek(0)
    start, reader = 1, csv.reader(file, delimiter=delimiter, strict=True)
    try:
        for _ in reader:
            start = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise InputError(f"{path}, line {start}: a quote is not closed; close it, or remove it") from error


def format_table(columns: Sequence[str], rows: Iterable[Mapping]) -> bytes:
    """A CSV file of some columns of the rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def is_blank(cell: str | None) -> bool:
    """Whether a cell holds no value. In a row that breaks off early, the last cells are None."""
    return cell is None or cell.strip().casefold() in NULLS


def names_nothing(text: str) -> bool:
    """Whether a cell is blank or says that its value is unknown, as "nan", "Unknown", "incertae sedis" or "?" do."""
    words = " ".join(text.casefold().replace("_", " ").split()).strip("<>()[].")
    return words in BLANKS or not any(character.isalnum() for character in words)


def clean_id(text: str) -> str:
    """Undo what a program did that read ids as floats: "7.0" and "7" become "7", "1e+05" becomes "100000"."""
    text = text.strip()
    if re.fullmatch(r"[+-]?\d+(\.\d+)?([eE]\+\d\d+)?", text) and not text.isdecimal():
        value = Decimal(text)
        if value == value.to_integral_value():
            return str(int(value))
    return text


def compose(text: str) -> str:
    """Text in Unicode's composed form: "ö" is one character, which the file names of macOS have as "o" and a mark."""
    return unicodedata.normalize("NFC", text)


def escape_undecodable(text: str) -> str:
    """Text that can be written as UTF-8: a byte of a file's name that is no UTF-8 becomes an escape such as \\udce9.

    A grader could not read a file with such a byte at all; of an escape, it misses one row at most.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def find_path(folder: Path, path: str) -> str:
    """A relative path as it is spelt in a folder, in whichever of Unicode's forms; if it is not there, as it is given.

    Args:
        path: with "/".
    """
    if path.isascii() or os.path.exists(folder / path):
        return path
    found = ""
    for part in path.split("/"):
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        own = next((form for form in forms if os.path.exists(folder / found / form)), None)
        if own is None:
            return path
        found = os.path.join(found, own)
    return found


def plain_number(text: str) -> str:
    """An id without leading zeros, in Unicode's composed form."""
    return str(int(text)) if text.isascii() and text.isdecimal() else compose(text)


def respell(ids: Iterable[str], sample: Iterable[str], key: Callable[[str], str] = plain_number) -> dict[str, str]:
    """Spell ids as the sample submission does: "7" becomes "007" where that has "007".

    Args:
        key: what spellings of one id have in common.

    Returns:
        The spelling of each id. An id that the sample lacks stays as it is; if it is there in both of Unicode's forms,
        in that of the first.

    Raises:
        InputError: two ids differ only in leading zeros, and the sample does not say which is right.
    """
    known: dict[str, set[str]] = {}
    for text in sample:
        known.setdefault(key(clean_id(text)), set()).add(text.strip())
    spelt: dict[str, str] = {}
    first: dict[str, str] = {}
    for text in ids:
        spellings = known.get(key(text), set())
        if len(spellings) == 1:
            spelt[text] = next(iter(spellings))
            continue
        other = first.setdefault(key(text), text)
        if text not in spellings and compose(other) == compose(text):
            spelt[text] = other
            continue
        if other != text and text not in spellings:
            raise InputError(
                f"the ids {other!r} and {text!r} differ only in leading zeros: spell them alike in all tables"
            )
        spelt[text] = text
    return spelt


def visible(paths: Iterable[Path]) -> list[Path]:
    """Paths sorted by name, without hidden ones."""
    return sorted(path for path in paths if not is_hidden(path.name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name does not belong to what was downloaded."""
    return name.startswith(".") or name in HIDDEN


def photo_name(cell: str) -> str:
    """The relative path of a photo in a table's cell, which may have Windows' backslashes; "7.0" is the photo "7"."""
    return clean_id(cell).replace("\\", "/").lstrip("/")


def describe_left_out(left_out: Counter) -> str:
    """What was left out, in brackets, such as " (left out: .heic files: 3)"; empty if nothing was."""
    return f" (left out: {', '.join(f'{what}: {count}' for what, count in left_out.most_common())})" if left_out else ""
