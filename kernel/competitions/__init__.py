"""All supported competitions. To support another one, add its module here and to the tests' SMALLEST."""

from kernel.competitions import class_folders, fungi, herbarium, plantclef, table
from kernel.competitions.competition import Competition
from kernel.inputs import InputError
from kernel.manifest import CompetitionSpec

# A folder may fit several competitions; the first of equals counts.
MODULES = (fungi, herbarium, plantclef, table, class_folders)
COMPETITIONS = tuple(competition for module in MODULES for competition in module.COMPETITIONS)


def competition_named(name: str) -> Competition:
    """The competition of a name.

    Raises:
        InputError: it is not one of these.
    """
    known = {competition.name: competition for competition in COMPETITIONS}
    if name not in known:
        raise InputError(f"unknown competition {name!r}: expected {', '.join(known)}; train again with this version")
    return known[name]


def competition_of(trained: CompetitionSpec) -> Competition:
    """The competition that weights were trained on, with the settings that were found in its folder.

    Raises:
        InputError: it is not one of these, or the settings are damaged.
    """
    return competition_named(trained.name).with_settings(trained.settings)


def module_of(competition: Competition) -> str:
    """The name of the module that knows a competition; of all these modules, a script holds this one alone."""
    names = {one.name: module.__name__ for module in MODULES for one in module.COMPETITIONS}
    return names[competition.name].rpartition(".")[2]
