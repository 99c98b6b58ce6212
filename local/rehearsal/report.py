"""Play scenarios, print their results, and summarise them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from local.base.console import say
from local.base.metrics import describe, losses_of, sample_f1, score, set_scores
from local.bundling.record import ScenarioResult, record_results
from local.rehearsal.rehearsal import Rehearsal
from local.rehearsal.scenarios import SCENARIOS, play


@dataclass(frozen=True)
class Report:
    """The result of a rehearsal.

    Attributes:
        scores: of the scenario `plain`, as of `metrics.score`; empty without a solution.
        photos_per_second, peak_memory_mb: of the scenario `plain`.
    """

    scenarios: tuple[ScenarioResult, ...]
    scores: dict[str, float] = field(default_factory=dict)
    photos_per_second: float | None = None
    peak_memory_mb: float | None = None

    def to_json(self) -> dict:
        """What `--json` writes: the scores are beside the other keys."""
        values = asdict(self)
        return values | values.pop("scores")

    @property
    def failed(self) -> list[str]:
        """Names of the scenarios that failed."""
        return [result.name for result in self.scenarios if not result.ok]

    @property
    def verdict(self) -> str:
        """The last line: `ready to push`, or why not."""
        skipped = [result.name for result in self.scenarios if result.is_skipped]
        if self.failed:
            return f"not ready to push: {', '.join(self.failed)} failed"
        if len(self.scenarios) < len(SCENARIOS):
            return f"{self.scenarios[0].name} is ok; --scenario all says whether the bundle is ready to push"
        return "ready to push" + (f" (skipped: {', '.join(skipped)})" if skipped else "")


def rehearse(data: Path, build: Path, solution: Path | None = None) -> Report:
    """Run the bundle once as Kaggle would; submission.csv and kernel.log are kept in `build`/rehearsal/plain.

    Arguments and errors are those of `Rehearsal`.
    """
    with Rehearsal(data, build, solution) as rehearsal:
        return play_all(rehearsal, ["plain"])


def play_all(rehearsal: Rehearsal, names: Sequence[str]) -> Report:
    """Play scenarios and print each result; the results are also recorded beside the bundle for `local/publish.py`."""
    results = []
    for name in names:
        result = play(rehearsal, name)
        results.append(result)
        verdict = "ok" if result.ok else "FAILED"
        say(f"{name:18} {verdict:6} {result.seconds:7.1f} s  {result.reason}".rstrip())
    record_results(rehearsal.build, results)
    if "plain" not in rehearsal.runs:
        return Report(tuple(results))
    run, scores = rehearsal.runs["plain"][0], {}
    if rehearsal.truth and not run.failure:
        truth = [rehearsal.truth[observation] for observation in run.guesses]
        competition, guesses, losses = run.table.competition, list(run.guesses.values()), None
        if competition.form.classes:
            submitted = competition.read_submission(rehearsal.output("plain") / "submission.csv")
            losses = losses_of(truth, [answer for _, answer in submitted])
        if competition.form.is_set:
            scores = set_scores(sample_f1([own.split() for own in truth], guesses))
        else:
            scores = score(truth, guesses, losses=losses)
        say(describe(scores, competition.guesses))
    speed = run.summary.speed if run.summary else None
    if run.summary:
        from local.rehearsal.estimate import estimate_on_t4  # imports torch, which `--help` does not need

        say(estimate_on_t4(rehearsal.manifest, run.photos, rehearsal.limit))
    return Report(tuple(results), scores, speed, round(run.outcome.peak_memory_mb, 1))
