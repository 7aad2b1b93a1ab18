"""The paper's claims on a real model: what is learned, carried over, and forgotten; the choice of channels; fusion.

    arithmetic     worked problems: loss of held-out ones; commonsense by likelihood; perplexity of plain text
    writing        the same, at the same rates: six tests, answered in writing
    commonsense    four tasks; then three of these and two others, answered in writing; and all that arithmetic measures
    selection      the paper's strategies, each largest and smallest, on arithmetic: loss of held-out examples; random channels
                   and the largest weights are there already
    fusion         an adapter of each suite, on the same or on disjoint channels, beside LoRA's exact sum: loss of held-out
                   examples of both, as answers in writing are too few to tell a fusion from its parts

Each contender's rate is the best of its grid on held-out examples. Runs are kept one by one, so that the study can stop and go
on, on another machine too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock

from s2ft.lab.registry import TellShare
from s2ft.lab.study.bars import bars_by_part
from s2ft.lab.study.chains import experiments, identity, named, side_by_side
from s2ft.lab.study.contenders import TUNING_SEED, VANILLA, Contender
from s2ft.lab.study.experiment import MEASURED
from s2ft.lab.study.material import TESTS, examples_digest, knowledge_digest, questions_digest
from s2ft.lab.study.report import HELD_OUT, LOSS, PERPLEXITY, StudyReport
from s2ft.lab.study.runs import Performer, Result, Runs, Settings
from s2ft.lab.study.selection import PAPERS, contender
from s2ft.lab.study.summary import Row
from s2ft.lab.study.training import Workload
from s2ft.lab.study.tuning import DIVERGED, best_kept, best_of_grid

BUDGET = 0.0109  # LoRA of rank 5 on all linear layers, the nearest, has 4% more on SmolLM2
LORA = Contender("lora", "lora", BUDGET)
S2FT = Contender("s2ft", "s2ft", BUDGET, "weight")
RANDOM = Contender("s2ft, random", "s2ft", BUDGET)
ARITHMETIC = (
    Contender("full", "full"),
    LORA,
    Contender("dora", "dora", BUDGET),
    Contender("shira", "shira", BUDGET),
    RANDOM,
    S2FT,
)
COMMONSENSE = tuple(who for who in ARITHMETIC if who.name != "shira")
STRATEGY = {RANDOM: "R", S2FT: "W+"}  # of arithmetic's contenders that are two of the selection's as well
SELECTION = (*STRATEGY, *(contender(name, BUDGET) for name in PAPERS if name not in STRATEGY.values()))
RATES: dict[str, tuple[float, ...]] = {  # of each method, tried first: the better one is at an edge, so a third follows
    "full": (4e-5, 8e-5),
    "lora": (2e-3, 4e-3),
    "dora": (2e-3, 4e-3),
    "shira": (4e-3, 8e-3),
    "s2ft": (2e-3, 4e-3),
}
WORKLOAD = Workload(steps=40, batch_size=4, train_examples=160, test_examples=0)  # seeds before size
KEPT = "kept"
Chain = Callable[[], list[Row]]


@dataclass(frozen=True)
class Part:
    """What a part of the study trains, and what it asks."""

    tasks: tuple[str, ...]
    measured: str  # of `MEASURED`
    rates_of: tuple[str, ...]  # parts that tune its rates
    has_base: bool = False  # the untouched model is measured, too


PARTS = {
    "arithmetic": Part(("arithmetic",), "known", ("arithmetic",), has_base=True),
    "writing": Part(("arithmetic",), "written", ("arithmetic",), has_base=True),
    "commonsense": Part(("commonsense",), "all", ("commonsense",), has_base=True),
    "selection": Part(("arithmetic",), "test", ("selection",)),
    "fusion": Part(("arithmetic", "commonsense"), "test", ("arithmetic", "commonsense")),
}


@dataclass(frozen=True)
class RealSettings:
    """What the study does; the defaults are what was recorded."""

    seeds: int = 3
    parts: tuple[str, ...] = tuple(PARTS)
    contenders: Mapping[str, tuple[Contender, ...]] = field(
        default_factory=lambda: {
            "arithmetic": ARITHMETIC,
            "writing": ARITHMETIC,
            "commonsense": COMMONSENSE,
            "selection": SELECTION,
            "fusion": (LORA, RANDOM),
        }
    )
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: RATES)
    workload: Workload = WORKLOAD
    kept: bool = False  # report what is kept, and run nothing

    @property
    def runs(self) -> int:
        """The number of runs, if no grid of learning rates has to grow."""
        tuned = {(of, who) for part in self.parts for of in PARTS[part].rates_of for who in self.contenders[part]}
        trained = [who for part in self.parts if part != "fusion" for who in self.contenders[part]]
        fused = [variant for who in self.contenders["fusion"] if "fusion" in self.parts for variant in variants(who)]
        vanilla = [part for part in self.parts if PARTS[part].has_base]
        return (
            sum(len(self.rates[who.method]) for _, who in tuned)
            + self.seeds * (len(trained) + len(fused))
            + len(vanilla)
        )

    def restricted(self, only: str | None) -> RealSettings:
        """To the parts named, with commas between them; "kept" takes the runs that are in the folder, and runs nothing.

        Raises:
            S2FTError: if a name is neither.
        """
        asked = named(only, (*PARTS, KEPT))
        parts = tuple(part for part in self.parts if part in asked) or self.parts
        return replace(self, parts=parts, kept=KEPT in asked)


def variants(who: Contender) -> dict[str, bool]:
    """The ways in which a contender's adapters are fused: name → whether their channels are disjoint."""
    if who.method != "s2ft":
        return {who.name: False}
    return {f"{who.name}, same channels": False, f"{who.name}, disjoint channels": True}


def study_real(
    folder: Path,
    settings: RealSettings | None = None,
    tell: TellShare | None = None,
    *,
    model: str,
    data: str,
    workers: int = 1,
    only: str | None = None,
) -> StudyReport:
    """Runs the study, or what of it is not in `folder` yet.

    Args:
        tell: Is told the share of the runs that are done.
        model: A chat model's folder, GGUF file or name on the Hub.
        data: LLM-Adapters' folder.
        workers: Runs at a time, each in a process of its own.
        only: The parts to run, as in `RealSettings.restricted`; None: all.

    Raises:
        S2FTError: if model or data cannot be read, or `folder` holds runs of another version of the study.
    """
    settings = (settings or RealSettings()).restricted(only)
    runs = Runs(folder, settings.runs, tell, identity(model))
    with experiments(model, data, workers, idle=settings.kept) as performer:
        study = _Study(runs, performer, settings, data)
        rows = [
            row
            for part in settings.parts  # whole parts are there early, and fusions find the others' rates
            for own in side_by_side(list(study.chains(part)), performer)
            for row in own
        ]
    found = {"learning_rate": study.tuned, "seconds": round(runs.seconds), "environments": runs.environments}
    return StudyReport({**asdict(settings), **found}, rows, ("part", "method"), picture=bars_by_part)


@dataclass
class _Study:
    """Runs, and who performs them."""

    runs: Runs
    performer: Performer
    settings: RealSettings
    data: str  # LLM-Adapters' folder
    tuned: dict[str, dict[str, float | None]] = field(default_factory=dict)  # part → contender → rate
    locks: dict[tuple[str, str], Lock] = field(default_factory=dict)

    def chains(self, part: str) -> Iterator[Chain]:
        """What can run side by side: a chain for each contender of a part, and each way to fuse."""
        if PARTS[part].has_base:
            yield partial(self._vanilla, part)
        for who in self.settings.contenders[part]:
            if part == "fusion":
                yield from (partial(self._fused, who, *variant) for variant in variants(who).items())
            else:
                yield partial(self._strategy, who) if part == "selection" else partial(self._scored, part, who)

    def _vanilla(self, part: str) -> list[Row]:
        asked = {**self._asked(VANILLA, part, PARTS[part].measured), "rate": 0.0}
        return [
            row for seed, result in self._results(asked, seeds=1) for row in _rows(part, VANILLA.name, seed, result)
        ]

    def _scored(self, part: str, who: Contender) -> list[Row]:
        """Tunes the rate, then trains with every seed."""
        rate = self._rate(PARTS[part].rates_of[0], who)
        measured = PARTS["arithmetic" if who in STRATEGY and part == "selection" else part].measured
        asked = {**self._asked(who, part, measured), "rate": rate}
        found = self._results(asked, self.settings.seeds) if rate is not None else []
        return [row for seed, result in found for row in _rows(part, who.name, seed, result)]

    def _strategy(self, who: Contender) -> list[Row]:
        """As the paper names it, and its losses alone."""
        rows = [row for row in self._scored("selection", who) if row["task"] in (HELD_OUT, LOSS)]
        return [{**row, "method": STRATEGY.get(who, who.name)} for row in rows]

    def _fused(self, who: Contender, variant: str, disjoint: bool) -> list[Row]:
        rates = {suite: self._rate(suite, who) for suite in TESTS}
        digests = {suite: self._digests(suite, PARTS["fusion"].measured) for suite in TESTS}
        asked = {"fusion": asdict(who), "disjoint": disjoint, "rates": rates, "data": digests}
        asked["recipe"] = asdict(self.settings.workload)
        return [
            _row(f"fusion, {suite}", f"{variant}: {fusion}", HELD_OUT, seed, loss)
            for seed, result in self._results(asked, self.settings.seeds)
            for fusion, suites in (result.items() if DIVERGED not in result else ())
            for suite, loss in suites.items()
        ]

    def _results(self, asked: Settings, seeds: int) -> list[tuple[int, Result]]:
        """Of each seed; of those that are kept, where nothing is to be run."""
        wanted = [{**asked, "seed": seed} for seed in range(seeds)]
        wanted = [one for one in wanted if not self.settings.kept or self.runs.has(one)]
        results = self.runs.results(wanted, self.performer)
        return [(one["seed"], result) for one, result in zip(wanted, results, strict=True)]

    def _rate(self, part: str, who: Contender) -> float | None:
        """Tuned once, whoever asks first; None where nothing is to be run and none was tried."""
        with self.locks.setdefault((part, who.name), Lock()):
            if who.name not in self.tuned.setdefault(part, {}):
                self.tuned[part][who.name] = self._tune(part, who)
            return self.tuned[part][who.name]

    def _tune(self, part: str, who: Contender) -> float | None:
        asked = {**self._asked(who, part, "validation"), "seed": TUNING_SEED}
        rates = self.settings.rates[who.method]
        if self.settings.kept:
            return best_kept(self.runs, rates, asked, _low_loss)
        return best_of_grid(self.runs, rates, asked, self.performer, _low_loss)

    def _asked(self, who: Contender, part: str, measured: str) -> Settings:
        (task,) = PARTS[part].tasks
        return {
            "contender": asdict(who),
            "task": task,
            "data": self._digests(task, measured),
            "recipe": asdict(self.settings.workload),
            "measured": measured,
        }

    def _digests(self, task: str, measured: str) -> str:
        """Of what such a run reads: the examples, and what is asked besides."""
        asked: dict[str, Callable[[str], str]] = {"known": knowledge_digest, "written": partial(questions_digest, task)}
        return "/".join([examples_digest(task, self.data), *(asked[name](self.data) for name in MEASURED[measured])])


def _low_loss(result: Result) -> float:
    return -float(result["held_out"])


def _rows(part: str, method: str, seed: int, result: Result) -> Iterator[Row]:
    """A row for each score: accuracies, losses, perplexity."""
    for name, task in (("held_out", HELD_OUT), ("training_loss", LOSS), ("perplexity", PERPLEXITY)):
        if name in result:
            yield _row(part, method, task, seed, result[name])
    for name, way in (("written", ""), ("chosen", ", by likelihood")):
        for task, score in result.get(name, {}).items():
            yield _row(part, method, f"{task}{way}", seed, score)


def _row(part: str, method: str, task: str, seed: int, score: float) -> Row:
    return {"part": part, "method": method, "task": task, "seed": seed, "score": score}
