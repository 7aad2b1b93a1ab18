"""Rows of several adapters that come and go: each answer is what `generate` writes alone; and what one row does to others."""

import copy
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from families import tokens
from s2ft.serve.job import End, Event, Failure, Piece, Told
from s2ft.serve.row import Row
from s2ft.serve.sampling import tell
from s2ft.serve.scheduler import FullError, StoppingError, Watch
from served import Desk, greedy, save_adapters, talkative

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (7, 1, 12, 3, 20, 5, 9, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    base, root = talkative("llama"), tmp_path_factory.mktemp("adapters")
    save_adapters(base, root, 4)
    return base, root


def prompt(length: int = 5) -> list[int]:
    return tokens(length).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_each_row_is_what_generate_writes_for_its_adapter_alone(family: str, tmp_path: Path) -> None:
    """Rows join while others are under way, and leave before them; three of eight have a place at a time."""
    base = talkative(family)
    names: list[str | None] = [*save_adapters(base, tmp_path, 3, {"down_proj": 0.3, "up_proj": 0.2}, 1.0), None]
    desk, jobs = Desk(base, tmp_path, rows=3), []
    for number, length in enumerate(LENGTHS):
        jobs.append(desk.ask(prompt(length), names[number % 4], count=4 + 5 * (number % 3)))
        desk.turn(number % 3)
    desk.finish()
    answers = set()
    for number, job in enumerate(jobs):
        name = names[number % 4]
        wanted = greedy(base, name and tmp_path / name, job.prompt, job.sampling.max_tokens)
        assert desk.tokens(job) == wanted
        assert desk.last(job) == End("length", len(wanted))
        answers.add(tuple(greedy(base, None, job.prompt, job.sampling.max_tokens)) == tuple(wanted))
    assert answers == {True, False}  # the adapters do change what is said


def test_what_is_drawn_follows_from_the_seed_and_not_from_the_batch(saved: tuple[torch.nn.Module, Path]) -> None:
    how = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "count": 12}
    text = prompt(6)
    alone = Desk(*saved)
    first, again, other = (alone.ask(text, "user1", **{**how, "seed": seed}) for seed in (7, 7, 8))
    alone.finish()
    crowd = Desk(*saved, rows=8)
    for number in range(5):
        crowd.ask(prompt(3 + number), f"user{number % 4}", count=9, temperature=1.5, seed=number)
    crowd.turn(3)
    among = crowd.ask(text, "user1", **how)
    crowd.finish()
    assert alone.tokens(first) == alone.tokens(again) == crowd.tokens(among)
    assert alone.tokens(first) != alone.tokens(other)


def test_an_end_token_and_a_stop_string_end_an_answer(saved: tuple[torch.nn.Module, Path]) -> None:
    base, root = saved
    text, wanted, place = _with_a_new_token(base, root / "user2")
    letters = [chr(0x4E00 + token) for token in wanted]
    ending = Desk(base, root, ends=[wanted[place]])
    job = ending.ask(text, "user2", count=10)
    ending.finish()
    assert ending.text(job) == "".join(letters[:place])
    assert ending.tokens(job) == wanted[: place + 1]
    assert ending.last(job) == End("stop", place + 1)
    stopping = Desk(base, root)
    job = stopping.ask(text, "user2", count=10, stop=("nowhere", letters[place - 1] + letters[place]))
    stopping.finish()
    assert stopping.text(job) == "".join(letters[: place - 1])
    assert stopping.last(job) == End("stop", place + 1)


def _with_a_new_token(base: torch.nn.Module, folder: Path) -> tuple[list[int], list[int], int]:
    """A prompt, its greedy answer, and the place, from 2 on, of a token that stands there first: some answers repeat theirs."""
    for _ in range(50):
        text = prompt(4)
        wanted = greedy(base, folder, text, 10)
        places = [place for place in range(2, 10) if wanted[place] not in wanted[:place]]
        if places:
            return text, wanted, places[0]
    raise AssertionError("every answer repeats itself")


def test_logprobs_are_those_of_the_model(saved: tuple[torch.nn.Module, Path]) -> None:
    base, root = saved
    desk, text = Desk(base, root), prompt(6)
    desk.ask(prompt(9), "user0", count=3)
    job = desk.ask(text, None, count=4, top_logprobs=3, tell_prompt=True)
    nothing = desk.ask(text, None, count=0, top_logprobs=1, tell_prompt=True)
    desk.finish()
    whole = [*text, *desk.tokens(job)]
    with torch.no_grad():
        wanted = base(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    told = [
        *desk.prompt(job).tokens,
        *(told for event in desk.events[job] if isinstance(event, Piece) for told in event.tokens),
    ]
    assert [one.token for one in told] == whole
    assert told[0].logprob is None
    for place, one in enumerate(told[1:]):
        assert one.logprob == pytest.approx(wanted[place, whole[place + 1]].item(), abs=1e-4)
        best = wanted[place].topk(3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [one.token for one in desk.prompt(nothing).tokens] == text
    assert desk.last(nothing) == End("length", 0)


class TestOneRowAndTheOthers:
    def test_an_adapter_that_cannot_be_used_fails_its_own_rows(self, saved: tuple[torch.nn.Module, Path]) -> None:
        base, root = saved
        desk, text = Desk(base, root), prompt()
        good = desk.ask(text, "user0", count=8)
        desk.turn(2)
        bad = desk.ask(text, "nowhere", count=8)
        late = desk.ask(text, "user1", count=8)
        desk.finish()
        assert desk.events[bad] == [Failure("adapter")]
        assert desk.tokens(good) == greedy(base, root / "user0", text, 8)
        assert desk.tokens(late) == greedy(base, root / "user1", text, 8)

    def test_who_is_cancelled_or_late_leaves_and_the_others_stay(self, saved: tuple[torch.nn.Module, Path]) -> None:
        base, root = saved
        desk, text = Desk(base, root, rows=3), prompt()
        stays, goes, late = (desk.ask(text, f"user{number}", count=9) for number in range(3))
        waits = desk.ask(text, None, count=2)
        desk.turn(2)
        goes.is_cancelled, late.deadline = True, 0.0
        desk.finish()
        assert desk.tokens(stays) == greedy(base, root / "user0", text, 9)
        assert len(desk.tokens(goes)) == len(desk.tokens(late)) < 9
        assert isinstance(desk.events[goes][-1], Piece)
        assert desk.last(late) == Failure("timeout")
        assert desk.last(waits) == End("length", 2)

    def test_a_failure_of_the_model_costs_the_rows_under_way_only(
        self, saved: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, root = saved
        desk, text = Desk(base, root, rows=2), prompt()
        running = [desk.ask(text, f"user{number}", count=9) for number in range(2)]
        waits = desk.ask(text, "user2", count=4)
        desk.turn(2)

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no memory")

        monkeypatch.setattr(desk.base.tuner.model, "forward", fail)
        desk.turn()
        monkeypatch.undo()
        desk.finish()
        assert [desk.last(job) for job in running] == [Failure("engine")] * 2
        assert desk.tokens(waits) == greedy(base, root / "user2", text, 4)

    def test_a_prompt_that_cannot_be_read_costs_those_that_join(
        self, saved: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, root = saved
        desk, text = Desk(base, root), prompt()
        runs = desk.ask(text, "user0", count=6)
        desk.turn()
        joins = desk.ask([999], "user1", count=6)  # no such token
        desk.finish()
        assert desk.events[joins] == [Failure("engine")]
        assert desk.tokens(runs) == greedy(base, root / "user0", text, 6)

    def test_a_prompt_whose_logprobs_cannot_be_told_costs_its_own_job(
        self, saved: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, root = saved
        desk, text, longer = Desk(base, root), prompt(), prompt(9)
        runs = desk.ask(text, "user0", count=6)
        desk.turn()

        def tell_short(logits: torch.Tensor, *more: Any) -> list[Told]:
            if len(logits) == len(longer) - 1:
                raise RuntimeError("no memory")
            return tell(logits, *more)

        monkeypatch.setattr("s2ft.serve.row.tell", tell_short)
        how = {"top_logprobs": 1, "tell_prompt": True}
        bad, none = (desk.ask(longer, "user1", count=count, **how) for count in (4, 0))
        late = desk.ask(text, "user2", count=4, **how)
        desk.finish()
        assert desk.events[bad] == desk.events[none] == [Failure("engine")]
        assert desk.tokens(runs) == greedy(base, root / "user0", text, 6)
        assert desk.tokens(late) == greedy(base, root / "user2", text, 4)

    def test_who_has_an_end_keeps_it_when_the_engine_fails_after_it(
        self, saved: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk, add = Desk(*saved), Row.add
        ends, goes_on = (desk.ask(prompt(), "user0", count=count) for count in (3, 9))
        desk.turn()

        def add_to_the_first(row: Row, told: Told) -> list[Event]:
            if row.job is goes_on:
                raise RuntimeError("a bug")
            return add(row, told)

        monkeypatch.setattr(Row, "add", add_to_the_first)
        desk.finish()
        assert [desk.last(job) for job in (ends, goes_on)] == [End("length", 3), Failure("engine")]

    @pytest.mark.parametrize("how", [{"count": 8}, {"count": 0, "top_logprobs": 1, "tell_prompt": True}])
    def test_logits_that_are_not_finite_fail_their_own_row(
        self, saved: tuple[torch.nn.Module, Path], tmp_path: Path, how: dict[str, Any]
    ) -> None:
        base, root = saved
        save_adapters(base, tmp_path, 1, size=1e37)
        shutil.copytree(root / "user1", tmp_path / "user1")
        desk, text = Desk(base, tmp_path), _overflowing(base, tmp_path / "user0")
        good = desk.ask(text, "user1", count=8)
        plain = desk.ask(text, None, count=8)
        bad = desk.ask(text, "user0", **how)
        desk.finish()
        assert desk.events[bad] == [Failure("overflow")]
        assert desk.tokens(good) == greedy(base, root / "user1", text, 8)
        assert desk.tokens(plain) == greedy(base, None, text, 8)


def _overflowing(base: torch.nn.Module, folder: Path) -> list[int]:
    """A prompt whose logits are not finite: a norm can make zeros of values that are large, but not infinite yet."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    for _ in range(50):
        text = prompt()
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0]
        if not logits[-1].isfinite().any():
            return text
    raise AssertionError("the logits of every prompt are finite")


class Noted(Watch):
    def __init__(self) -> None:
        self.tiers: Counter[str] = Counter()
        self.rows: list[int] = []

    def step(self, rows: int) -> None:
        self.rows.append(rows)

    def adapter(self, tier: str) -> None:
        self.tiers[tier] += 1


class TestRoom:
    def test_a_job_waits_while_its_adapter_does_not_fit_beside_the_others(
        self, saved: tuple[torch.nn.Module, Path]
    ) -> None:
        base, root = saved
        sizes = [(root / f"user{number}" / "adapter_model.safetensors").stat().st_size for number in range(4)]
        watch = Noted()
        desk = Desk(base, root, device_bytes=sum(sorted(sizes)[-2:]), host_bytes=0, rows=8, watch=watch)
        texts = [prompt(3 + number) for number in range(8)]
        order = [random.randrange(4) for _ in texts]
        jobs = [desk.ask(text, f"user{number}", count=3) for text, number in zip(texts, order, strict=True)]
        desk.finish()
        for job, text, number in zip(jobs, texts, order, strict=True):
            assert desk.tokens(job) == greedy(base, root / f"user{number}", text, 3)
        assert desk.pool.used()[0] <= desk.pool.device_bytes
        assert watch.tiers["disk"] >= len(set(order))
        assert sum(watch.tiers.values()) == len(jobs)
        assert sum(watch.rows) == 2 * len(jobs)  # the first of three tokens comes with the prompt

    def test_rows_of_one_adapter_need_its_room_once(self, saved: tuple[torch.nn.Module, Path]) -> None:
        size = (saved[1] / "user0" / "adapter_model.safetensors").stat().st_size
        desk = Desk(*saved, device_bytes=size)
        for _ in range(2):
            desk.ask(prompt(), "user0", count=9)
            desk.turn()
        assert len(desk.scheduler._rows) == 2

    def test_an_adapter_that_is_larger_than_all_the_room_fails(self, saved: tuple[torch.nn.Module, Path]) -> None:
        desk = Desk(*saved, device_bytes=1)
        job = desk.ask(prompt(), "user0")
        desk.finish()
        assert desk.events[job] == [Failure("adapter")]

    def test_more_than_may_wait_are_not_taken(self, saved: tuple[torch.nn.Module, Path]) -> None:
        desk = Desk(*saved, rows=2, waiting=1)
        jobs = [desk.ask(prompt(), None) for _ in range(3)]
        with pytest.raises(FullError):
            desk.ask(prompt(), None)
        desk.finish()
        assert all(isinstance(desk.last(job), End) for job in jobs)
        desk.ask(prompt(), None)

    def test_those_whose_prompts_are_being_read_count_and_are_stopped(
        self, saved: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk = Desk(*saved, rows=2, waiting=1)
        batch, jobs = desk.scheduler._batch, [desk.ask(prompt(), None) for _ in range(2)]
        join = batch.join

        def join_meanwhile(*what: Any) -> torch.Tensor:
            jobs.append(desk.ask(prompt(), None))
            with pytest.raises(FullError):
                desk.ask(prompt(), None)
            desk.scheduler.stop()
            return join(*what)

        monkeypatch.setattr(batch, "join", join_meanwhile)
        desk.finish()
        assert [desk.last(job) for job in jobs] == [Failure("stopping")] * 3

    def test_a_retired_adapter_leaves_the_pool_once_nobody_has_it(self, saved: tuple[torch.nn.Module, Path]) -> None:
        desk, gone = Desk(*saved), list[str]()
        desk.ask(prompt(), "user0", count=4)
        desk.turn()
        desk.scheduler.retire("user0", lambda: gone.append("user0"))
        desk.scheduler.retire("user0", lambda: gone.append("again"))
        desk.turn()
        assert "user0" in desk.pool
        assert gone == []
        desk.finish()
        desk.turn()
        assert "user0" not in desk.pool
        assert gone == ["user0", "again"]
        again = desk.ask(prompt(), "user0", count=2)
        desk.finish()
        assert desk.last(again) == End("length", 2)


def test_the_thread_answers_and_ends_when_it_is_closed(saved: tuple[torch.nn.Module, Path]) -> None:
    desk = Desk(*saved)
    desk.scheduler.start()
    jobs = [desk.ask(prompt(), f"user{number % 4}", count=2000) for number in range(5)]
    desk.scheduler.close()
    assert not desk.scheduler.is_alive
    assert all(desk.last(job) == Failure("stopping") for job in jobs)
    with pytest.raises(StoppingError):
        desk.ask(prompt(), None)
