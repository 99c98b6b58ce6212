"""The labelled observations of a competition as one encoder sees them: which are learnt from, and which judge."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kernel.bank import Bank
from kernel.encoders import Encoder
from kernel.inputs import shorten
from kernel.metadata_prior import MetadataPrior
from local.banks.estimators import spread_over
from local.banks.folds import make_folds
from local.banks.metadata_prior import PriorEstimator
from local.banks.search import Embedded, Search, cross_validated, walk
from local.base.console import counted, say
from local.base.files import write_table, write_tensors
from local.base.metrics import describe, held_out_scores
from local.base.run_folder import VALIDATION_FILE
from local.data.cache import EmbeddingCache
from local.data.competition import Competition, Labelled, lineages, places_of, read_taxonomy, sort_ids
from local.data.photos import check_readable
from local.recipes.settings import CANDIDATES, BankSettings

CANDIDATES_FILE = "candidates.csv"


class Study:
    """What a bank is fitted to and chosen by.

    Args:
        settings: of the bank; `views` are all that may be used.
        choose: the settings that `choose` selects.
        is_macro: see `Search`.
        seed: of the folds, and of all else that is drawn at random.

    Attributes:
        unreadable: the cause of each photo that could not be read.
        labelled: all labelled observations, those of val after those of train.
        reference: (observations,) bool, of which the bank is made.
        classes: the bank's class ids, in order.
        folds: (reference, queries), each (observations,) bool. Where the competition's val is kept out of the bank,
            val is the one fold's queries. Else observations of all are held out in turn; for an encoder that was tuned
            on some, only the others.
    """

    def __init__(
        self,
        settings: BankSettings,
        choose: Sequence[str],
        competition: Competition,
        fit: Labelled,
        validation: Labelled,
        encoder: Encoder,
        cache: Path,
        is_tuned: bool,
        head: Bank | None = None,
        head_classes: Sequence[str] = (),
        is_macro: bool = False,
        seed: int = 0,
    ):
        self.settings, self.keys, self.is_macro, self.seed = settings, tuple(choose), is_macro, seed
        self.encoder, self.cache, self.embedded = encoder, cache, {}
        self.unreadable: dict[Path, str] = {}
        self.guesses, self.lineages = competition.layout.guesses, lineages(competition)
        class_ids = np.concatenate([fit.class_ids, validation.class_ids])
        self.is_fit = np.arange(len(class_ids)) < len(fit)
        self.labelled = Labelled([*fit.observations, *validation.observations], class_ids)
        is_fit = self.is_fit
        keeps_val_out = settings.reference == "train" and competition.has_val
        self.has_val, self.keeps_val_out = competition.has_val, keeps_val_out
        self.reference = is_fit if keeps_val_out else np.ones_like(is_fit)
        self.classes = sort_ids(class_ids[self.reference])
        self.head = spread_over(head, head_classes, self.classes) if head else None
        self.places = places_of(class_ids, self.classes)
        self.taxonomy = read_taxonomy(competition, self.classes)
        self.asked = asked = ~is_fit if is_tuned else np.ones_like(is_fit)
        self.folds = [(is_fit, ~is_fit)] if keeps_val_out else make_folds(self.places, seed, asked)

    def embed(self, resize_mode: str) -> Embedded:
        """All labelled observations in all views that may be used."""
        if resize_mode not in self.embedded:
            preprocessing = dataclasses.replace(self.encoder.preprocessing, fit=resize_mode)
            encoder = Encoder(self.encoder.module, preprocessing, self.encoder.features, self.encoder.devices)
            photos = EmbeddingCache(self.cache, encoder).embed(self.labelled.observations, self.settings.views)
            self.unreadable |= dict(photos.unreadable)
            self.embedded[resize_mode] = Embedded(
                photos.values, self.settings.views, photos.observations, self.places, self.taxonomy, self.head
            )
        return self.embedded[resize_mode]

    def embed_together(self) -> None:
        """Embed all that the choice may ask for, every process of the team its share.

        Raises:
            InputError: too many photos cannot be read.
        """
        own = (self.settings.resize_mode,)
        for resize_mode in CANDIDATES["resize_mode"] if "resize_mode" in self.keys else own:
            self.embed(resize_mode)
        photos = sum(len(observation.photos) for observation in self.labelled.observations)
        check_readable(list(self.unreadable.items()), photos)

    def fit_prior(self, reference: np.ndarray) -> MetadataPrior:
        """What place, season and substrate say of the classes, learnt from some of the observations."""
        return PriorEstimator().fit(self.labelled.subset(reference), self.classes, self.lineages).prior_

    def ask_prior(self, reference: np.ndarray, queries: np.ndarray) -> torch.Tensor | None:
        """(queries, classes) log-probabilities by the metadata alone; None where the tables have none."""
        if not any(observation.metadata for observation in self.labelled.observations):
            return None
        return self.fit_prior(reference).log_probabilities(self.labelled.subset(queries).observations)

    def choose(self, folder: Path) -> tuple[BankSettings, tuple[float, ...], dict[str, float]]:
        """Choose the settings that are left open, and judge them by observations that had no part in the choice.

        Args:
            folder: to leave the table of candidates and the answers to the held-out observations in.

        Returns:
            The chosen settings, the inverse temperatures of their banks, and their `held_out_scores`.
        """
        say(self.told_reference())
        if not self.folds:
            kept = f", and cannot choose {', '.join(self.keys)}" if self.keys else ""
            say(f"{self.told_folds()}: this run has no score{kept}")
            return self.settings, (), {}
        search = Search(
            self.embed,
            self.settings.resize_mode,
            self.folds,
            self.guesses,
            self.reference,
            self.ask_prior,
            self.is_macro,
            self.seed,
        )
        chosen, top = self.settings, None
        if self.keys:
            table: list[dict] = []

            def note(row: dict) -> None:
                table.append(row)
                say(told(row))  # at once, since with thousands of classes the choice takes minutes

            chosen = walk(search, self.settings, self.keys, np.ones(len(search.truth), dtype=bool), note)
            say("chosen: " + "  ".join(f"{key} = {getattr(chosen, key)}" for key in self.keys))
            top = cross_validated(search, self.settings, self.keys)
            write_table(table, folder / CANDIDATES_FILE)
        outcome = search.judge(chosen)
        guesses = [[self.classes[place] for place in row] for row in (outcome.top if top is None else top)]
        truth = self.labelled.class_ids[search.queries]
        scores = held_out_scores(truth, guesses, search.weights, self.is_macro, self.seed)
        if np.allclose(search.weights, 1):
            say(f"{self.told_folds()}: {describe(scores, self.guesses)}")
        else:
            how = "every class weighted the same" if self.is_macro else "weighted to the shots of the whole reference"
            say(f"{self.told_folds()}, {how}: {describe(scores, self.guesses)}")
            say(f"the same, unweighted: {describe(scores, self.guesses, 'unweighted_')}")
        self.keep_answers(search, chosen, folder / VALIDATION_FILE)
        return chosen, outcome.scales, scores

    def told_reference(self) -> str:
        """Which observations the bank is made of."""
        train, val = int(self.is_fit.sum()), int((~self.is_fit).sum())
        if self.keeps_val_out:
            return f"bank: made of the {counted(train, 'observation')} of train, without the {val:,} of val"
        if self.has_val:
            return f"bank: made of {counted(train + val, 'observation')}, {train:,} of train and {val:,} of val"
        return f"bank: made of the {counted(train + val, 'observation')} of train"

    def told_folds(self) -> str:
        """Which observations judge the run, in counts that add up."""
        train, val = int(self.is_fit.sum()), int((~self.is_fit).sum())
        held_out = sum(int(queries.sum()) for _, queries in self.folds)
        told = counted(held_out, "held-out observation")
        if self.keeps_val_out:
            foreign = int((self.places < 0).sum())
            return f"{told} (val" + (f"; {foreign:,} of classes that the bank lacks)" if foreign else ")")
        alone = int((self.asked & (np.bincount(self.places)[self.places] == 1)).sum())
        left_out = {
            "kept for training": 0 if self.asked.all() else train,
            f"alone in {'its' if alone == 1 else 'their'} class": alone,
            "not drawn": int(self.asked.sum()) - alone - held_out,
        }
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        folds = f"in {counted(len(self.folds), 'fold')} over " if self.folds else "of "
        of = f"the {train:,} of train and {val:,} of val" if self.has_val else f"the {train + val:,} of train"
        return f"{told}, {folds}{of}{f' (left out: {why})' if why else ''}"

    def keep_answers(self, search: Search, chosen: BankSettings, path: Path) -> None:
        """Write the log-probabilities of every held-out observation, by which an ensemble is weighted later."""
        observations = [self.labelled.observations[query].id for query in search.queries]
        said = {"observations": json.dumps(observations), "classes": json.dumps(self.classes)}
        known = {"truth": torch.tensor(search.truth), "weights": torch.tensor(search.weights)}
        write_tensors({"log_probabilities": search.log_probabilities(chosen)[0].half(), **known}, path, said)


def told(row: dict) -> str:
    """A row of the table of candidates as a line: with its paired gain over what it would replace."""
    gain = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
    return (
        f"{row['key']:12} {shorten(row['value'], 44):44}  Recall@1 {row['recall_at_1']:.3f}  "
        f"Recall@5 {row['recall_at_5']:.3f}  gain {gain}"
    )
