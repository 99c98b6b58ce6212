"""Select the bank of an encoder: which observations it is made of, which settings it has, and how good it is."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kernel.bank import Bank
from kernel.metadata_prior import MetadataPrior, WeightedPrior, has_known_value
from local.banks.calibration import sharpen_
from local.banks.ensemble import HeldOutPredictions
from local.banks.estimators import TRAINED_MATCHERS, in_parts, refuse_large
from local.banks.evaluation import Evaluation, evaluate_predictions
from local.banks.fitting import Embedded, fit_banks
from local.banks.folds import MAX_FINAL_SCORES, MAX_SCORES, draw_queries, make_folds
from local.banks.metadata_prior import fit_prior
from local.banks.search import Search, coordinate_ascent, describe_value, most_candidates, nested_predictions
from local.base.console import Progress, counted, say
from local.base.metrics import LOG_LOSS, SCORE_NAMES, describe, held_out_scores
from local.base.scratch import scratch_array
from local.data.concatenated_encoders import ConcatenatedEncoders
from local.data.duplicates import NEAR_DUPLICATE, find_near_duplicates, plain_column
from local.data.observations import Split, encode_labels, sort_ids
from local.data.photos import check_readable
from local.recipes.settings import CANDIDATES, BankSettings


@dataclass(frozen=True, eq=False)
class BankPlan:
    """Which observations a bank is made of, and which evaluate it.

    Attributes:
        split: of the labelled observations; masks and labels are in its order.
        reference: (observations,) bool, those that the bank is made of.
        query_mask: (observations,) bool, those that may be held out to evaluate it, because the encoder was not trained
            on them.
        classes: the bank's class ids, sorted.
        labels: (observations,) int, index into `classes`; -1 for a class that the bank lacks.
        folds: (reference, queries) masks. If the competition's val is not in the bank, val is the one fold's queries.
            Otherwise observations are held out in turn.
        is_macro: whether every class has the same weight, as in a macro-F1, and not every observation.
        seed: of all that is drawn at random.
    """

    split: Split
    reference: np.ndarray
    query_mask: np.ndarray
    classes: list[str]
    labels: np.ndarray
    folds: list[tuple[np.ndarray, np.ndarray]]
    is_macro: bool
    seed: int

    @property
    def keeps_val_out(self) -> bool:
        """Whether the competition's val is not in the bank."""
        return not self.reference.all()

    def describe_reference(self) -> str:
        """Which observations the bank is made of."""
        train, val = int(self.split.train.sum()), int(self.split.validation.sum())
        if self.keeps_val_out:
            return f"bank: made of the {counted(train, 'observation')} of train, without the {val:,} of val"
        if self.split.labelled.has_val:
            return f"bank: made of {counted(train + val, 'observation')}, {train:,} of train and {val:,} of val"
        return f"bank: made of the {counted(train + val, 'observation')} of train"

    def describe_folds(self) -> str:
        """Which observations evaluate the bank, in counts that add up."""
        train, val = int(self.split.train.sum()), int(self.split.validation.sum())
        held_out = sum(int(queries.sum()) for _, queries in self.folds)
        text = counted(held_out, "held-out observation")
        if self.keeps_val_out:
            lacking = int((self.labels < 0).sum())
            return f"{text} (val" + (f"; {lacking:,} of classes that the bank lacks)" if lacking else ")")
        alone = int((self.query_mask & (np.bincount(self.labels)[self.labels] == 1)).sum())
        left_out = {
            "kept for training": 0 if self.query_mask.all() else train,
            f"alone in {'its' if alone == 1 else 'their'} class": alone,
        }
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        folds = f"in {counted(len(self.folds), 'fold')} over " if self.folds else "of "
        has_val = self.split.labelled.has_val
        of = f"the {train:,} of train and {val:,} of val" if has_val else f"the {train + val:,} of train"
        return f"{text}, {folds}{of}{f' (left out: {why})' if why else ''}"


def plan_bank(split: Split, reference: str, is_tuned: bool, is_macro: bool = False, seed: int = 0) -> BankPlan:
    """Decide which observations make a bank and which evaluate it.

    Args:
        reference: "train" or "train+val", the competition's splits to make the bank of.
        is_tuned: whether the encoder was trained on `split.train`, so that only `split.validation` can evaluate it.
        is_macro, seed: see `BankPlan`.
    """
    every, class_ids = np.ones_like(split.train), split.labelled.class_ids
    keeps_val_out = reference == "train" and split.labelled.has_val
    in_bank = split.train if keeps_val_out else every
    query_mask = split.validation if is_tuned else every
    classes = sort_ids(class_ids[in_bank])
    labels = encode_labels(class_ids, classes)
    folds = [(split.train, split.validation)] if keeps_val_out else make_folds(labels, seed, query_mask)
    return BankPlan(split, in_bank, query_mask, classes, labels, folds, is_macro, seed)


@dataclass(frozen=True, eq=False)
class SelectedBank:
    """A bank, and how it was selected.

    Attributes:
        settings: with those that were selected.
        banks: over the embeddings of the first encoder, of the first two, and so on: each a list of banks whose
            probabilities are averaged.
        metadata_prior: None where the settings give it no weight.
        scores: see `BankSelection._score`; empty where nothing could be held out. Where settings were
            selected, each observation is predicted with those that the others select.
        optimistic_scores: of the selected settings on the same observations that selected them; empty without any.
        candidates: the rows of the table of all settings that were compared.
        predictions: of the held-out observations; None where nothing could be held out.
        logit_scales: of the banks; empty where nothing could be held out.
        inverse_temperature: of all predictions; see `local.banks.calibration.fit_inverse_temperature`.
    """

    settings: BankSettings
    banks: list[list[Bank]] = dataclasses.field(default_factory=list)
    metadata_prior: MetadataPrior | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    optimistic_scores: dict[str, float] = dataclasses.field(default_factory=dict)
    candidates: list[dict] = dataclasses.field(default_factory=list)
    predictions: HeldOutPredictions | None = None
    logit_scales: tuple[float, ...] = ()
    inverse_temperature: float = 1.0


class BankSelection:
    """Selects a bank by cross-validation, and fits it.

    Args:
        settings: of the bank; `views` are all that may be used.
        choose: the names of the settings to select; those that only several encoders or poolings have are left out
            where there is one.
        plan: which observations to use.
        encoders: of the photos.
        cache: the folder of embeddings.
        head: over `plan.classes`, if one was trained with the encoder.
        texts: embeddings of the names of `plan.classes`, which the setting `text_weight` needs; see `Embedded`.

    Attributes:
        unreadable: the cause of each photo that could not be read.
    """

    def __init__(
        self,
        settings: BankSettings,
        choose: Sequence[str],
        plan: BankPlan,
        encoders: ConcatenatedEncoders,
        cache: Path,
        head: Bank | None = None,
        texts: np.ndarray | None = None,
    ):
        usable = {
            "encoder_weights": len(encoders.encoders) > 1,
            "pool_part": any(block.part for block in encoders.blocks),
        }
        if "pool_part" in choose and not usable["pool_part"]:
            say("pool_part is not chosen: no encoder has several poolings")
        self.settings, self.plan = settings, plan
        self.choose = tuple(name for name in choose if usable.get(name, True))
        self.encoders, self.cache, self.head, self.texts = encoders, cache, head, texts
        self.labelled = plan.split.labelled
        self.taxonomy = self.labelled.taxonomy(plan.classes)
        self.unreadable: dict[Path, str] = {}
        self._embedded: dict[str, Embedded] = {}
        self._priors: dict[bytes, MetadataPrior] = {}

    def embed(self, resize_mode: str, rounds: int = 1) -> Embedded:
        """All labelled observations in all views that may be used; for `rounds` see EmbeddingCache."""
        if resize_mode not in self._embedded:
            photos = self.encoders.embed(
                self.labelled.observations, self.settings.views, self.cache, resize_mode, rounds
            )
            self.unreadable |= dict(photos.unreadable)
            self._embedded[resize_mode] = Embedded(
                photos.values,
                self.settings.views,
                photos.observations,
                self.plan.labels,
                self.taxonomy,
                self.head,
                self.texts,
                self.encoders.blocks,
            )
        return self._embedded[resize_mode]

    def embed_all(self) -> None:
        """Embed in every resize mode that may be selected. Under torchrun, every process embeds a part.

        Raises:
            InputError: a matcher that may be selected does not fit in memory, or too many photos cannot be read.
        """
        is_chosen = "matcher" in self.choose and self.settings.matcher != "head"
        features = sum(encoder.features for encoder in self.encoders.encoders)
        values = len(self.labelled.photos) * len(self.settings.views) * features
        for matcher in {self.settings.matcher, *(CANDIDATES["matcher"] if is_chosen else ())} & TRAINED_MATCHERS:
            refuse_large(matcher, len(self.plan.labels), len(self.plan.classes), values)
        others = CANDIDATES["resize_mode"] if "resize_mode" in self.choose else ()
        modes = dict.fromkeys((self.settings.resize_mode, *others))
        for index, resize_mode in enumerate(modes):
            self.embed(resize_mode, len(modes) - index)
        check_readable(list(self.unreadable.items()), len(self.labelled.photos))
        self._name_absent_classes()

    def _name_absent_classes(self) -> None:
        """Print which classes of the bank have no readable photo. They stay, so that the ids of the others do too."""
        if not self.unreadable:
            return
        is_read = [not self.unreadable.keys() >= {*one.photos} for one in self.labelled.observations]
        present = set(self.plan.labels[self.plan.reference & np.array(is_read)].tolist())
        absent = [name for label, name in enumerate(self.plan.classes) if label not in present]
        if absent:
            names = ", ".join(map(repr, absent[:3])) + (", ..." if len(absent) > 3 else "")
            say(
                f"{counted(len(absent), 'class', 'classes')} without a readable photo, never predicted: {names}; "
                "download these photos again"
            )

    def embed_reference(self, settings: BankSettings) -> np.ndarray:
        """(reference observations, features) float16, rows of length 1, or 0 where no photo could be read."""
        pooled, rows = self.embed(settings.resize_mode).pooled(settings), np.flatnonzero(self.plan.reference)
        values = scratch_array((len(rows), pooled.shape[1]), np.float16)
        for part in in_parts(len(rows)):
            values[part] = torch.from_numpy(pooled[rows[part]]).half().numpy()  # numpy takes four times as long
        return values

    def select(self) -> SelectedBank:
        """Select the settings in `choose`, evaluate them on observations that had no part in it, and fit the bank."""
        return self.fit(self.evaluate())

    def evaluate(self) -> SelectedBank:
        """The first two steps of `select`: settings and scores without banks."""
        plan = self.plan
        say(plan.describe_reference())
        if not plan.folds:
            open_settings = f", and cannot choose {', '.join(self.choose)}" if self.choose else ""
            say(f"{plan.describe_folds()}: this run has no score{open_settings}")
            return SelectedBank(self.settings)
        held_out = sum(int(queries.sum()) for _, queries in plan.folds)
        search = self._search(MAX_SCORES // len(plan.classes))
        if len(search.truth) < held_out:
            say(
                f"{'settings are chosen and predictions kept' if self.choose else 'predictions are kept'} for "
                f"{len(search.truth):,} of the {counted(held_out, 'held-out observation')}, drawn at random, "
                f"since there are {counted(len(plan.classes), 'class')}"
            )
        settings, candidates = self.settings, []
        if self.choose and search.metric == LOG_LOSS:
            say("settings are chosen by the log-loss, the metric of the competition")
        if self.choose:
            with Progress(
                "selecting the bank", most_candidates(settings, self.choose, len(self.encoders.encoders)), "candidate"
            ) as bar:

                def note(row: dict) -> None:
                    candidates.append(row)
                    # Not at the end: with thousands of classes that takes minutes.
                    say(describe_candidate(row, search.metric))
                    bar.advance()

                every_query = np.ones(len(search.truth), dtype=bool)
                settings = coordinate_ascent(search, settings, self.choose, every_query, note)
            say("chosen: " + "  ".join(f"{key} = {describe_value(getattr(settings, key))}" for key in self.choose))
        with Progress("evaluating the bank on the held-out observations"):
            evaluation = search.evaluate(settings)
        nested, ids = nested_predictions(search, self.settings, self.choose), self.labelled.ids
        predictions = HeldOutPredictions(
            [ids[query] for query in search.queries],
            plan.classes,
            nested.log_probabilities,
            search.truth,
            search.weights,
            nested.view_votes,
        )
        found, scored = evaluate_predictions(nested.log_probabilities, search.truth), search
        if len(search.truth) < held_out:  # the other observations had no part in the choice
            prototypes = len(plan.labels) if settings.nearest_neighbour_weight else len(plan.classes)
            scored = self._search(MAX_FINAL_SCORES // prototypes)
            drawn, found = found, self._evaluate_all(scored, settings, evaluation)
            is_drawn = np.isin(scored.queries, search.queries)
            found.top[is_drawn], found.losses[is_drawn] = drawn.top, drawn.losses
        scores = self._score(scored, found)
        if len(scored.truth) < held_out:
            say(f"scored on {counted(len(scored.truth), 'held-out observation')}, drawn at random")
        self._describe(scores, scored.weights)
        self._describe_near_duplicates(settings, search.queries)
        optimistic = self._score(search, evaluation) if self.choose else {}
        return SelectedBank(
            settings,
            scores=scores,
            optimistic_scores=optimistic,
            candidates=candidates,
            predictions=predictions,
            logit_scales=evaluation.logit_scales,
            inverse_temperature=evaluation.inverse_temperature,
        )

    def _search(self, limit: int) -> Search:
        """A search with at most so many queries."""
        plan = self.plan
        return Search(
            self.embed,
            self.settings.resize_mode,
            draw_queries(plan.folds, limit, plan.seed),
            self.labelled.competition.guesses,
            plan.reference,
            self._metadata_prior,
            plan.is_macro,
            np.any([queries for _, queries in plan.folds], axis=0),
            plan.seed,
            self.labelled.competition.metric,
        )

    def _evaluate_all(self, search: Search, settings: BankSettings, drawn: Evaluation) -> Evaluation:
        """The evaluation of some settings on all queries, at the scales and the temperature of that of a part."""
        with Progress("evaluating all held-out observations", len(search.truth), "observation") as bar:

            def shown(chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
                for chunk in chunks:
                    yield sharpen_(chunk, drawn.inverse_temperature)
                    bar.advance(len(chunk))

            embedded, seed = self.embed(settings.resize_mode), self.plan.seed
            scales = drawn.logit_scales
            banks = (fit_banks(settings, embedded, reference, scales, seed) for reference, _ in search.folds)
            return evaluate_predictions(shown(search.predict(settings, banks)), search.truth)

    def _score(self, search: Search, found: Evaluation) -> dict[str, float]:
        """The scores of an evaluation of all queries, and their number `observations`."""
        plan, guesses = self.plan, [[self.plan.classes[index] for index in row] for row in found.top]
        truth = self.labelled.class_ids[search.queries]
        losses = found.losses if search.metric == LOG_LOSS else None
        scores = held_out_scores(truth, guesses, search.weights, plan.is_macro, plan.seed, losses)
        return scores | {"observations": float(len(truth))}

    def _describe(self, scores: dict[str, float], weights: np.ndarray) -> None:
        """Print the scores of the held-out observations, weighted and not."""
        plan, count = self.plan, self.labelled.competition.guesses
        if np.allclose(weights, 1):
            say(f"{plan.describe_folds()}: {describe(scores, count)}")
        else:
            how = "every class weighted the same" if plan.is_macro else "weighted to the shots of the whole reference"
            say(f"{plan.describe_folds()}, {how}: {describe(scores, count)}")
            say(f"the same, unweighted: {describe(scores, count, 'unweighted_')}")
        return scores

    def _describe_near_duplicates(self, settings: BankSettings, queries: np.ndarray) -> None:
        """Print how many photos of some held-out observations another observation of the bank has too, if any."""
        embedded = self.embed(settings.resize_mode)
        query_mask = np.isin(np.arange(len(embedded.labels)), queries)
        photos = embedded.values[:, [plain_column(embedded.views)]]
        found = find_near_duplicates(photos, embedded.observations, embedded.labels, query_mask, self.plan.reference)
        if len(found.photos):
            held_out = counted(int(query_mask[embedded.observations].sum()), "held-out photo")
            say(
                f"near-duplicates: {len(found.photos):,} of {held_out} with a cosine of {NEAR_DUPLICATE} or more to a "
                "photo of another observation in the bank, which may raise the scores; local/evaluate.py shows them"
            )

    def fit(self, selected: SelectedBank) -> SelectedBank:
        """The same with the banks, made of the whole reference, and a metadata prior if the settings weight it."""
        settings, reference, banks = selected.settings, self.plan.reference, []
        embedded = self.embed(settings.resize_mode)
        with Progress("fitting the bank"):
            for count in range(1, len(self.encoders.encoders) + 1):
                own = embedded if count == len(self.encoders.encoders) else self._embedded_by_first(count, embedded)
                banks.append(fit_banks(settings, own, reference, selected.logit_scales, self.plan.seed))
            prior = self._fit_prior(reference) if settings.metadata_weight else None
        return dataclasses.replace(selected, banks=banks, metadata_prior=prior)

    def fit_fold(self, selected: SelectedBank) -> list[Bank]:
        """The banks of the selected settings without the queries of the first fold."""
        embedded = self.embed(selected.settings.resize_mode)
        reference, _ = self.plan.folds[0]
        return fit_banks(selected.settings, embedded, reference, selected.logit_scales, self.plan.seed)

    def _embedded_by_first(self, count: int, embedded: Embedded) -> Embedded:
        """The embeddings of the first encoders alone, of length 1."""
        blocks = tuple(block for block in embedded.blocks if block.encoder < count)
        values = embedded.values[:, :, : sum(block.features for block in blocks)]
        values = (values * (len(self.encoders.encoders) / count) ** 0.5).astype(embedded.values.dtype)
        return dataclasses.replace(embedded, values=values, blocks=blocks)

    def _fit_prior(self, reference: np.ndarray) -> MetadataPrior:
        """What the metadata of some of the observations say of the classes, fitted once."""
        key = reference.tobytes()
        if key not in self._priors:
            self._priors[key] = fit_prior(self.labelled.subset(reference), self.plan.classes)
        return self._priors[key]

    def _metadata_prior(self, reference: np.ndarray, queries: np.ndarray) -> WeightedPrior | None:
        """(queries, classes) log-probabilities by the metadata alone; None where the queries have none."""
        if not self.labelled.has_metadata:
            return None
        prior = self._fit_prior(reference)
        rows = prior.rows(self.labelled.subset(queries).observations)
        return WeightedPrior(((1.0, prior, rows),)) if has_known_value(rows) else None


def describe_candidate(row: dict, metric: str = "") -> str:
    """A row of the table of candidates as a line, with its paired gain over the settings that it would replace.

    A gain is positive if it is better, also in a log-loss. The value comes last, because the names of views are too
    long for a column, and end differently.
    """
    gain = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
    names = (LOG_LOSS, "recall_at_1") if metric == LOG_LOSS else ("recall_at_1", "recall_at_5")
    scores = "  ".join(f"{SCORE_NAMES[name]} {row[name]:.3f}" for name in names)
    return f"{row['key']:24}  {scores}  gain {gain}  {row['value']}"
