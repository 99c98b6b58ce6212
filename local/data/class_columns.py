"""Find the column of a table that has the classes, and how a sample submission answers with them.

What is no classification of whole photos into one class each is refused in one line.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path

from kernel.competitions.table import SETTINGS_FILE, TableSettings, has_no_class, is_one
from kernel.inputs import InputError
from kernel.tables import clean_id, compose, is_blank, read_header
from local.data.photo_columns import Search, Table, is_number

# Usual names of the column of classes, without spaces and underscores: those of ids or of either kind, then of names.
LABELS = (
    ("label", "labels", "class", "classid", "labelid", "category", "categoryid", "target", "targetid", "y"),
    ("classname", "labelname", "categoryname", "species", "speciesid", "scientificname", "breed", "variety"),
)
BOXES = (
    *({name} for name in ("bbox", "bboxes", "boundingbox", "boundingboxes", "encodedpixels", "rle", "segmentation")),
    *({"encoding"}, {"polygon"}, {"xmin", "ymin"}, {"x1", "y1"}, {"x", "y", "width", "height"}, {"x", "y", "w", "h"}),
)


def refuse_boxes(state: Search, table: Table) -> None:
    """Refuse a table of boxes or masks, unless competition.toml names the column of classes.

    Raises:
        InputError: there are such columns.
    """
    names = {re.sub(r"[\s_]", "", name.casefold()): name for name in table.columns}
    boxes = next((own for own in BOXES if own <= names.keys()), None)
    if boxes and "label_column" not in state.given:
        found = ", ".join(sorted(names[name] for name in boxes))
        raise InputError(
            f"{table.path} has boxes or masks ({found}): localisation is not supported; to classify whole photos, "
            f"write label_column into {SETTINGS_FILE}"
        )


def guess_form(state: Search, sample: Table) -> None:
    """What the sample submission alone says of its form."""
    _, *answers = sample.columns
    if len(answers) > 1 and not state.settings.classes:
        first, last = min(answers), max(answers)  # of all, these two have the shortest prefix in common
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
        prefix = re.match(r"(.*[_\- ])?", first[:same]).group()  # whole words
        state.put(classes=tuple(compose(clean_id(name.removeprefix(prefix))) for name in answers))
    counts = {len(cell.split()) for cell in sample.columns[answers[0]]}
    state.put(guesses=max(counts, default=1) or 1)


def find_null_classes(state: Search, sample: Table) -> tuple[str, ...]:
    """What usually says that a value is missing, but is a class of the sample submission, or of competition.toml."""
    _, *answers = sample.columns
    cells = dict.fromkeys(sample.columns[answers[0]]) if len(answers) == 1 else ()
    named = [*state.settings.classes, *answers, *(name for cell in cells for name in (cell.strip(), *cell.split()))]
    return tuple(name for name in dict.fromkeys(named) if name and is_blank(name))


def find_labels(state: Search, train: Table, sample: Table) -> str:
    """Find the classes and the form of the submission; returns why they cannot be used, or an empty string."""
    _, *answers = sample.columns
    if len(answers) > 1:
        words = [cell for name in answers for cell in sample.values(name) if not is_number(cell)]
        if words:
            return (
                f"{sample.path} has the columns {', '.join(map(repr, answers[:6]))} with cells such as {words[0]!r}: "
                "expected one column of classes, or a column of probabilities for each class"
            )
        in_train = [name for name in answers if name in train.columns]
        if len(in_train) == len(answers) and not state.given.get("label_column"):
            return _check_one_hot(state, train, answers)
    given = state.given.get("classes", ())
    if given and (len(given) < 2 or len(given) - len(answers) not in (0, 1)):
        return (
            f"{SETTINGS_FILE} has {len(given)} classes for {len(answers)} columns of {sample.path}: write one for each "
            "column, and the class that has the rest of the probability, if there is one"
        )
    if repeated := [name for name, count in Counter(given).items() if count > 1]:
        return f"{state.folder / SETTINGS_FILE} repeats {repeated[0]!r} in classes: write each class once"
    said = (
        {token for cell in sample.values(answers[0]) for token in (cell, *cell.split())} if len(answers) == 1 else set()
    )
    nulls = state.settings.null_classes
    label, candidates = _find_label_column(state, train, answers, {clean_id(one) for one in said} | {*nulls})
    if not label:
        if not candidates:
            return f"{train.path} has no column of classes: write label_column into {SETTINGS_FILE}"
        return (
            f"{train.path}: the classes may be in {' or '.join(map(repr, candidates))}: write label_column into "
            f"{state.folder / SETTINGS_FILE}"
        )
    labels = _labels_in(train, label, state.settings)
    state.put(label_column=label, null_classes=tuple(name for name in nulls if name in labels))
    state.doubts += [
        f"{train.path}: {name!r} in {label!r} is taken to be a class, as {sample.path.name} or {SETTINGS_FILE} "
        "names it: remove its rows if they have no class"
        for name in state.settings.null_classes
    ]
    if problem := _find_several_labels(state, train, label, labels):
        return problem
    state.put(metadata_columns=tuple(name for name in state.settings.metadata_columns if name != label))
    if len(answers) > 1:
        return _match_classes(state, sample.path, train.path, labels)
    if unknown := [name for name in given if name not in labels]:
        several = ", ".join(map(repr, sorted(labels)[:6])) + (", ..." if len(labels) > 6 else "")
        return (
            f"{state.folder / SETTINGS_FILE} has {unknown[0]!r} in classes, but {label!r} of {train.path} has "
            f"{several}: write the classes as they are spelt there"
        )
    cells = [clean_id(cell) for cell in sample.values(answers[0])]
    if (
        not given
        and len(labels) > 1
        and len(labels) == sum(not has_no_class(cell, state.settings) for cell in train.columns[label])
    ):
        return (
            f"{train.path} has another {label!r} in each row, so these are no classes: write label_column into "
            f"{SETTINGS_FILE}"
        )
    if len(labels) == 2 and all(map(is_number, cells)) and any(map(_is_fraction, cells)):
        positive = next((name for name in labels if name == compose(answers[0])), max(labels))
        state.put(classes=(positive, min(labels - {positive})))
    elif labels == {"0", "1"} and not given:
        state.doubts.append(
            f"{sample.path} is taken to have one class in a row: if it has the probability of '1', write "
            f'classes = ["1", "0"] into {SETTINGS_FILE}'
        )
    return "" if state.settings.classes else _count_guesses(state, sample, cells, labels)


def _labels_in(train: Table, column: str, settings: TableSettings) -> set[str]:
    """The distinct cells of a column, if it is that of the classes."""
    return {clean_id(cell) for cell in dict.fromkeys(train.columns[column]) if not has_no_class(cell, settings)}


def _is_fraction(cell: str) -> bool:
    return is_number(cell) and not float(cell).is_integer()


def _find_label_column(
    state: Search, train: Table, answers: Sequence[str], said: Collection[str]
) -> tuple[str, list[str]]:
    """The column of classes; or "" and the columns among which nothing decides.

    Args:
        said: what the sample submission answers, whole and in words.
    """
    settings = state.settings
    if given := state.given_column("label_column", train):
        return given, []
    used = {settings.image_column, settings.observation_column, ""}
    values = {name: _labels_in(train, name, settings) for name in train.columns if name not in used}
    left = [name for name, own in values.items() if len(own) > 1]
    plain = {name: re.sub(r"[\s_]", "", name.casefold()) for name in left}
    test = read_header(state.path(settings.test_table)) if settings.test_table else []
    classes = set(settings.classes)
    matched = {name: len(values[name] & classes) for name in left}
    # A single number is what a sample submission answers everywhere without meaning it.
    is_placeholder = len(said) == 1 and all(map(is_number, said))
    filters = (
        lambda name: len(answers) == 1 and name == answers[0],
        lambda name: matched[name] == max(matched.values()) and 2 * matched[name] >= len(values[name]),
        lambda name: bool(said & values[name]) and not is_placeholder,
        lambda name: plain[name] in LABELS[0] + LABELS[1],
        lambda name: bool(said & values[name]) and plain[name] in LABELS[0] + LABELS[1],
        lambda name: plain[name] in LABELS[0],
        lambda name: plain[name] in LABELS[1],
        lambda name: name not in test,
        lambda name: 2 * len(values[name]) <= train.rows and not all(map(_is_fraction, values[name])),
    )
    for is_likely in filters:
        if kept := [name for name in left if is_likely(name)]:
            left = kept
        if len(left) == 1:
            break
    return (left[0], []) if len(left) == 1 else ("", left)


def _check_one_hot(state: Search, train: Table, answers: Sequence[str]) -> str:
    """The training table has a column of 0 and 1 for each class: each photo must be of one class."""
    state.put(classes=tuple(answers), label_column="")
    for row in range(train.rows):
        ones = [name for name in answers if is_one(train.columns[name][row])]
        if len(ones) != 1:
            image = train.columns[state.settings.image_column][row] if state.settings.image_column else row
            return (
                f"{train.path}: photo {image} has {len(ones)} classes ({', '.join(ones[:3]) or 'none'}): multi-label "
                "competitions are not supported"
            )
    return ""


def _find_several_labels(state: Search, train: Table, label: str, labels: Collection[str]) -> str:
    """Why a table has several classes for a photo, in one line; empty if it does not."""
    if state.settings.image_column in train.columns:
        first: dict[str, str] = {}
        for image, cell in zip(train.columns[state.settings.image_column], train.columns[label], strict=True):
            if is_blank(image) or has_no_class(cell, state.settings):
                continue
            if clean_id(first.setdefault(image, cell)) != clean_id(cell):
                return (
                    f"{train.path} has several rows of photo {image!r} with different classes, such as "
                    f"{first[image]!r} and {cell!r}: localisation and multi-label competitions are not supported"
                )
    for separator in () if "label_column" in state.given else "|;, ":
        cells = [[token.strip() for token in one.split(separator)] for one in sorted(labels)]
        counts = Counter(token for tokens in cells for token in set(tokens))
        compound = [tokens for tokens in cells if len(tokens) > 1]
        several = [
            tokens
            for tokens in compound
            if (
                any(counts[token] > 1 for token in tokens)
                and (separator in "|;" or all(token in labels or token.isdecimal() for token in tokens))
            )
            or (separator == "," and all(counts[token] > 1 for token in tokens))
        ]
        if several and 2 * len(several) >= len(compound):
            return (
                f"{train.path}: {label!r} has several classes in a cell, such as {separator.join(several[0])!r}: "
                "multi-label competitions are not supported; if that is one class, write label_column into "
                f"{SETTINGS_FILE}"
            )
    return ""


def _match_classes(state: Search, sample: Path, train: Path, labels: Collection[str]) -> str:
    """Compare the columns of probabilities with the classes of training."""
    _, *answers = state.settings.header
    whole, classes = tuple(compose(clean_id(name)) for name in answers), state.settings.classes
    classes = max((whole, classes), key=lambda own: len(labels & set(own)))
    state.put(classes=classes)
    classes = tuple(map(compose, state.settings.classes))
    both = labels & set(classes)
    if not both:
        return (
            f"{sample} has columns such as {answers[0]!r}, and {train} classes such as {min(labels)!r}: none is both; "
            f"write label_column, or classes, into {SETTINGS_FILE}"
        )
    if lacking := sorted(labels - both):
        state.doubts.append(
            f"{sample} lacks {len(lacking)} of the {len(labels)} classes of {train.name}, such as {lacking[0]!r}: "
            "their probability is left out"
        )
    if untrained := [name for name in classes if name not in both]:
        state.doubts.append(
            f"{train} lacks {len(untrained)} of the {len(classes)} classes of {sample.name}, such as {untrained[0]!r}: "
            "their probability is 0"
        )
    return ""


def _count_guesses(state: Search, sample: Table, cells: Sequence[str], labels: Set[str]) -> str:
    """How many classes a row of the submission has; returns why its answers are no classes, or an empty string."""
    guesses, has_spaces = state.settings.guesses, any(" " in label for label in labels)
    for separator in "|;,":
        split = [token.strip() for cell in cells if separator in cell for token in cell.split(separator)]
        if split and labels.issuperset(split) and not labels.intersection(cells):
            return (
                f"{sample.path} has classes separated by {separator!r}: only one class, or several by spaces, are "
                "supported"
            )
    others = {cell: list(map(clean_id, cell.split())) for cell in cells if cell not in labels}
    said = {token for tokens in others.values() for token in tokens}
    if "guesses" not in state.given:
        if wrong := _find_other_answers(sample, others, labels):
            return f"{sample.path} {wrong}; if a row has classes, write guesses into {SETTINGS_FILE}"
        counts = {len(cell.split()) for cell in cells}
        if has_spaces and not labels.issuperset(said):
            guesses = 1
        guesses = guesses if others else 1
        if guesses > 1 and len(counts) > 1:
            state.doubts.append(
                f"{sample.path} has {min(counts)} to {guesses} classes in a row: each row gets {guesses}, unless "
                f"{SETTINGS_FILE} has another number of guesses"
            )
    if said and "label_column" not in state.given and all(map(is_number, labels)) and not any(map(is_number, said)):
        return (
            f"{sample.path} answers with words such as {cells[0]!r}, but {state.settings.label_column!r} of "
            f"{state.settings.train_table} has numbers: write label_column into {SETTINGS_FILE}, or add a column of "
            "the words"
        )
    state.put(guesses=guesses)
    unknown = [cell for cell in (said if guesses > 1 else others) if cell not in labels and not is_number(cell)]
    if unknown:
        state.doubts.append(
            f"{sample.path} answers with {min(unknown)!r}, which is no class in {state.settings.train_table}: it is "
            "never predicted"
        )
    if guesses > 1 and has_spaces:
        spaced = min(label for label in labels if " " in label)
        return (
            f"{sample.path} has {guesses} classes in a row, separated by spaces, which the class {spaced!r} has in its "
            "name"
        )
    return ""


def _find_other_answers(sample: Table, cells: Mapping[str, Sequence[str]], labels: Set[str]) -> str:
    """What a sample submission answers with, if these are no classes; empty if they may be.

    Args:
        cells: its answers that are no class, each with its words.
    """
    ids = set(sample.columns[next(iter(sample.columns))])
    words = {word for label in labels for word in label.split()}
    for cell, tokens in cells.items():
        example = f"such as {cell!r}"
        if ids.issuperset(cell.split()) and not all(map(is_number, tokens)):
            return f"answers with its own ids, {example}: to find photos of the same class is not supported"
        if _is_fraction(cell):
            return f"answers with numbers, {example}, that are no classes: to predict a number is not supported"
        if len(tokens) > 1 and _is_fraction(tokens[-1]) and tokens[-1] not in labels:
            return f"answers with a class and a number, {example}: confidences are not supported"
        if len(tokens) > 1 and not labels.issuperset(tokens) and 2 * len(words.intersection(tokens)) > len(tokens):
            return f"answers with words of several classes, {example}: multi-label competitions are not supported"
    return ""
