"""MT-Bench from question to rating, with a judge on this machine that can be as unhelpful as real ones are."""

import gzip
import html
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from fake_judge import KEY, FakeJudge
from s2ft import S2FTError
from s2ft.cli.app import app
from s2ft.data.prompts import alpaca_conversation
from s2ft.evaluate.answers import Answers
from s2ft.evaluate.engines import Answer, TransformersEngine
from s2ft.evaluate.judge import Judge, JudgeDown, NoRating, find_judge, read_rating
from s2ft.evaluate.mt_bench import Dialogue, judge_messages, load_dialogues, write_dialogues
from s2ft.evaluate.options import EvalOptions
from s2ft.evaluate.run import EvalReport, evaluate
from s2ft.evaluate.tasks import Decoding
from tiny_base import CHAT_TEMPLATE, byte_tokenizer, save_tiny_base


@pytest.fixture
def server(monkeypatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fake = FakeJudge()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


@pytest.fixture
def data(tmp_path) -> str:
    """Four questions; the two of math have references, one in a file and one of its own."""
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 111, "category": "math", "turns": ["2+2?", "And 3?"]},
        {"question_id": 112, "category": "math", "turns": ["3+3?", "And 1?"], "reference": ["six", "seven"]},
        {"question_id": 151, "category": "stem", "turns": ["Why?", "How?"], "reference": ["because", "so"]},
    ]
    folder = tmp_path / "data" / "mt_bench"
    (folder / "reference_answer").mkdir(parents=True)
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = {"question_id": 111, "choices": [{"turns": ["four", "SEVEN in all"]}]}
    (folder / "reference_answer" / "any.jsonl").write_text(json.dumps(reference) + "\n")
    return str(tmp_path / "data")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(save_tiny_base(tmp_path_factory.mktemp("base"), CHAT_TEMPLATE))


def rated(base: str, data: str, output: Path, judge: Judge | None = None) -> EvalReport:
    options = {"model": base, "task": ["mt-bench"], "data": data, "output": output, "max_new_tokens": 3}
    return evaluate(EvalOptions(**options, precision="fp32"), judge=judge)


HELLO = [{"role": "user", "content": "hello"}]


class TestJudge:
    def test_it_is_asked_as_openai_would_be(self, server) -> None:
        assert server.judge().rate(HELLO) == (7.0, "Fine. Rating: [[7]]")
        assert server.requests == [
            {"path": "/v1/chat/completions", "model": "strict-1", "temperature": 0, "messages": HELLO}
        ]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        server.judge(key=None).rate(HELLO)
        assert "Authorization" not in server.headers[1]

    @pytest.mark.parametrize(
        "failure",
        [
            (429, b"slow down", {"Retry-After": "0"}),
            (503, b"", {}),
            (200, b"<html>busy</html>", {}),
            (200, b"{}", {}),
            (200, b"[" * 200_000, {}),
            (200, b'{"choices": [{"message": {"content": null}}]}', {}),
            "I would rather not say.",
            "Rating: [[0]] or [[11]]",
        ],
    )
    def test_what_may_pass_is_tried_again(self, server, failure) -> None:
        server.reply = lambda number, _: "Rating: [[4]]" if number == 3 else failure
        assert server.judge().rate(HELLO)[0] == 4
        assert len(server.requests) == 3
        server.reply = lambda *_: failure
        with pytest.raises(NoRating, match="tried 3 times"):
            server.judge().rate(HELLO)
        assert len(server.requests) == 6

    def test_pauses_double_unless_the_server_names_one(self, server, monkeypatch) -> None:
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
        server.reply = lambda number, _: (429, b"", {"Retry-After": "17"} if number == 3 else {})
        with pytest.raises(JudgeDown):
            server.judge(attempts=5, pause=2.0).rate(HELLO)
        assert pauses == [2, 4, 17, 16]

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_what_will_not_pass_is_said_at_once_and_without_the_key(self, server, status) -> None:
        server.reply = lambda *_: (status, f"bad key {KEY}".encode(), {})
        with pytest.raises(
            S2FTError, match=rf"cannot be used: the judge answered with HTTP {status}: bad key \*\*\*"
        ) as caught:
            server.judge().rate(HELLO)
        assert len(server.requests) == 1
        assert KEY not in str(caught.value)
        assert KEY not in repr(server.judge())

    @pytest.mark.parametrize("key", ["sk-" + "a1B2/c3D4+e5F6" * 3, 'sk-"q"uo\\te<&>d7', "sk-7"])
    def test_a_key_that_the_judge_repeats_is_kept_nowhere(self, server, key) -> None:
        spelt = (key, json.dumps(key), key.replace("/", "\\/"), quote(key, safe=""), html.escape(key))
        judge = server.judge(key=key, attempts=1)

        def parts(text: str) -> list[str]:
            return [text[start : start + 8] for start in range(len(text) - 7)] or [text]

        for spelling in spelt:
            server.reply = lambda *_: f"Your key is {spelling}. Rating: [[7]]"  # noqa: B023
            assert judge.rate(HELLO)[0] == 7
            said = [judge.rate(HELLO)[1]]
            cuts = {80 - len(spelling) // 2, 80, 400 - len(spelling) // 2, 400, 0}
            for reply in (
                lambda text: text,
                lambda text: (400, text.encode(), {}),
                lambda text: (503, text.encode(), {}),
            ):
                for cut in cuts:
                    server.reply = lambda *_: reply("x" * cut + spelling + "y" * 60)  # noqa: B023
                    with pytest.raises(NoRating) as caught:
                        judge.rate(HELLO)
                    said.append(str(caught.value))
            found = [part for part in {*parts(key), *parts(spelling)} for text in said if part in text]
            assert found == []

    def test_a_text_without_the_key_stays_as_it_is(self, server) -> None:
        server.reply = lambda *_: "sk-keys are secret, 7 of them. Rating: [[7]]"
        assert server.judge(key="sk-secret-7-and-more").rate(HELLO)[1] == "sk-keys are secret, 7 of them. Rating: [[7]]"

    def test_a_refused_question_is_an_error_of_that_question(self, server) -> None:
        server.reply = lambda *_: (400, b"too long", {})
        with pytest.raises(NoRating, match="HTTP 400: too long"):
            server.judge().rate(HELLO)
        assert len(server.requests) == 1

    def test_a_redirect_does_not_get_the_key(self, server) -> None:
        server.reply = lambda *_: (307, b"", {"Location": f"{server.url}/elsewhere"})
        with pytest.raises(S2FTError, match="HTTP 307"):
            server.judge().rate(HELLO)
        assert len(server.requests) == 1

    @pytest.mark.parametrize("key", [KEY, None])
    def test_it_gets_its_own_key_and_nothing_else_of_the_environment(self, server, monkeypatch, key) -> None:
        for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.setenv(name, "sk-elsewhere")
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-elsewhere\nX-Mine: sk-elsewhere")
        monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
        server.judge(key=key).rate(HELLO)
        names = {"Host", "Accept", "Content-Type", "Content-Length", "Connection", *(["Authorization"] if key else [])}
        assert {name.title() for name in server.headers[0]} <= names
        assert "sk-elsewhere" not in str(server.headers)

    @pytest.mark.parametrize("status", [200, 400])
    def test_an_answer_without_end_is_none(self, server, monkeypatch, status) -> None:
        monkeypatch.setattr("s2ft.evaluate.judge_http.LARGEST", 2**10)
        server.reply = lambda *_: (status, b" " * 2**16, {})
        with pytest.raises(JudgeDown, match=r"no answer from the judge: .*took too long, or has no end"):
            server.judge().rate(HELLO)

    def test_a_packed_answer_is_not_unpacked(self, server) -> None:
        body = gzip.compress(json.dumps({"choices": [{"message": {"content": "[[7]]"}}]}).encode())
        server.reply = lambda *_: (200, body, {"Content-Encoding": "gzip"})
        with pytest.raises(NoRating, match="is not JSON"):
            server.judge().rate(HELLO)

    def test_a_judge_that_is_down_or_slow_is_told_from_one_that_talks_nonsense(self, server) -> None:
        gone = Judge("http://127.0.0.1:9/v1", "m", attempts=2, pause=0.01)
        with pytest.raises(JudgeDown, match="no answer from the judge"):
            gone.rate(HELLO)
        waiting = threading.Event()
        server.reply = lambda *_: waiting.wait(20) and ""
        with pytest.raises(JudgeDown, match="no answer from the judge"):
            server.judge(timeout=0.2, attempts=1).rate(HELLO)
        waiting.set()
        server.reply = lambda *_: "no"
        with pytest.raises(NoRating) as caught:
            server.judge().rate(HELLO)
        assert not isinstance(caught.value, JudgeDown)

    @pytest.mark.parametrize(
        ("text", "rating"),
        [
            ("[[10]]", 10),
            ("[[ 7.5 ]]", 7.5),
            ("[[2]] then [[9]]", 9),
            ("[[10.5]]", None),
            ("[9]", None),
            ("[[nine]]", None),
        ],
    )
    def test_a_rating_is_the_last_one_in_double_brackets(self, text, rating) -> None:
        assert read_rating(text) == rating


class TestFindJudge:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch) -> None:
        for name in ("S2FT_JUDGE_URL", "S2FT_JUDGE_MODEL", "S2FT_JUDGE_KEY"):
            monkeypatch.delenv(name, raising=False)

    def test_options_win_over_the_environment_and_the_key_is_only_there(self, monkeypatch) -> None:
        assert find_judge() is None
        monkeypatch.setenv("S2FT_JUDGE_URL", "https://a/v1")
        monkeypatch.setenv("S2FT_JUDGE_MODEL", "m")
        monkeypatch.setenv("S2FT_JUDGE_KEY", KEY)
        assert find_judge() == Judge("https://a/v1", "m", KEY)
        assert find_judge("http://b/v1", "n") == Judge("http://b/v1", "n", KEY)

    @pytest.mark.parametrize("url", [
        "file:///etc/passwd", "host/v1", "http://", "http://a b/v1", "http://[::1/v1", "http://host:port/v1", "http://h:99999/v1",
        "http://a..b/v1", f"http://{'a' * 64}.de/v1", "http://hö.de/v1", "http://h/v1\t", "http://h\n/v1", "http://me:pw7@h/v1",
        "http://h/v1?token=pw7", "http://h/v1#pw", "http://h\\v1",
    ])  # fmt: skip
    def test_addresses_that_are_none_are_refused(self, url) -> None:
        with pytest.raises(S2FTError, match="must be like https://host/v1") as caught:
            find_judge(url, "m")
        assert "pw7" not in str(caught.value)

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:8000/v1", "https://[::1]:80/v1/", "http://localhost", "https://a.b-c.de/x/v1"]
    )
    def test_addresses_are_taken(self, url) -> None:
        assert find_judge(url, "m").url == url

    def test_half_a_judge_and_half_a_key_are_refused(self, monkeypatch) -> None:
        with pytest.raises(S2FTError, match="judge_model='m' alone is not enough: give --judge-url"):
            find_judge(model="m")
        monkeypatch.setenv("S2FT_JUDGE_KEY", "sk-a\nb")
        with pytest.raises(S2FTError, match="S2FT_JUDGE_KEY holds characters that no key has") as caught:
            find_judge("http://a/v1", "m")
        assert "sk-a" not in str(caught.value)


class TestQuestions:
    def test_references_come_from_files_or_from_the_questions(self, data) -> None:
        found = {dialogue.id: dialogue for dialogue in load_dialogues(data)}
        assert list(found) == ["81", "111", "112", "151"]
        assert found["111"].references == ("four", "SEVEN in all")
        assert found["112"].references == ("six", "seven")
        assert load_dialogues(f"{data}/mt_bench", limit=1) == [found["81"]]

    def test_math_without_a_reference_is_refused(self, data) -> None:
        (Path(data) / "mt_bench" / "reference_answer" / "any.jsonl").unlink()
        with pytest.raises(S2FTError, match=r"question\.jsonl:2: question 111 \(math\) needs a reference"):
            load_dialogues(data)

    def test_the_judge_sees_what_it_needs_and_no_more(self, data) -> None:
        found = {dialogue.id: dialogue for dialogue in load_dialogues(data)}
        first, second = (judge_messages(found["111"], answers) for answers in (["4"], ["4", "77"]))
        assert "And 3?" not in first[1]["content"]
        assert "SEVEN" not in first[1]["content"]
        for text in ("2+2?", "four", "4", "And 3?", "SEVEN in all", "77"):
            assert text in second[1]["content"]
        assert "[[n]]" in first[0]["content"]
        assert "the last answer" in second[0]["content"]
        plain = judge_messages(found["151"], ["hm"])  # a reference, but of a category that is judged without
        assert "because" not in plain[1]["content"]
        assert "reference" not in plain[0]["content"]

    def test_the_second_turn_gets_the_first_answer(self, data, tmp_path) -> None:
        asked = []

        class Engine:
            def answers(self, prompts, decoding, done=()):
                asked.extend(byte_tokenizer().decode(ids) for ids in prompts)
                yield [(index, Answer(f"answer {index}" if index != 1 else None, error="lost" if index == 1 else None))
                       for index in range(len(prompts))]  # fmt: skip

        dialogues, answers = load_dialogues(data), Answers(tmp_path / "a.jsonl", {})
        write_dialogues(Engine(), dialogues, "alpaca", byte_tokenizer(), answers, Decoding(1, 3), lambda _: None)
        assert asked[4:] == [
            alpaca_conversation([("Write.", "answer 0")], "Again."),
            alpaca_conversation([("3+3?", "answer 2")], "And 1?"),
            alpaca_conversation([("Why?", "answer 3")], "How?"),
        ]
        assert answers.rows["111-1"]["error"] == "lost"
        assert answers.rows["111-2"]["error"] == "turn 1 has no answer to build on"
        assert {name for name in answers.rows if name not in answers.done} == {"111-1", "111-2", "112-2"}

    def test_chat_prompts_alternate(self) -> None:
        dialogue = Dialogue("1", "stem", ("a", "b"), ())
        roles = [message["role"] for message in dialogue.prompt(["x"], "chat")]
        assert (roles, dialogue.prompt(["x"], "chat")[1]["content"]) == (["user", "assistant", "user"], "x")


class TestWhole:
    def test_answers_first_ratings_later_and_neither_twice(self, server, base, data, tmp_path, monkeypatch) -> None:
        written = rated(base, data, tmp_path / "out").ratings
        assert (written[0]["answered"], written[0]["rated"], written[0]["rating"], written[0]["errors"]) == (
            8,
            0,
            None,
            0,
        )
        monkeypatch.setattr(TransformersEngine, "answers", lambda *_: pytest.fail("all is answered"))
        numbers = [3, 5, 10, 8, 1, 2, 6, 4]
        server.reply = lambda number, _: f"Rating: [[{numbers[number - 1]}]]"
        found = {row["part"]: row for row in rated(base, data, tmp_path / "out", server.judge()).ratings}
        assert list(found) == ["all", "turn 1", "turn 2", "writing", "math", "stem"]
        assert found["all"]["rating"] == fmean(numbers)
        assert found["turn 2"]["rating"] == fmean(numbers[1::2])
        assert found["math"]["rating"] == fmean(numbers[2:6])
        assert found["all"]["low"] < found["all"]["rating"] < found["all"]["high"]
        again = rated(base, data, tmp_path / "out", server.judge()).ratings
        assert again == list(found.values())
        assert len(server.requests) == 8
        assert all(KEY not in path.read_text() for path in (tmp_path / "out").rglob("*.jsonl"))

    def test_a_rating_that_failed_is_an_error_and_asked_again(self, server, base, data, tmp_path) -> None:
        server.reply = lambda _, request: "no" if "2+2?" in request["messages"][1]["content"] else "[[5]]"
        judge = server.judge(attempts=1)
        report = rated(base, data, tmp_path / "out", judge)
        assert (report.ratings[0]["rated"], report.ratings[0]["errors"], report.errors) == (6, 2, 2)
        assert report.ratings[0]["rating"] == 5
        server.reply = lambda *_: "[[9]]"
        report = rated(base, data, tmp_path / "out", judge)
        assert (report.ratings[0]["rated"], report.errors, len(server.requests)) == (8, 0, 10)

    def test_a_judge_that_is_down_is_given_up_on_where_first_turns_are_rated_already(
        self, server, base, data, tmp_path
    ):
        server.reply = lambda number, _: "[[5]]" if number % 2 else "no rating"
        rated(base, data, tmp_path / "out", server.judge(attempts=1))
        before = len(server.requests)
        server.reply = lambda *_: (500, b"oh", {})
        with pytest.raises(S2FTError, match="left 3 answers in a row unrated"):
            rated(base, data, tmp_path / "out", server.judge(attempts=1))
        assert len(server.requests) - before == 3

    def test_a_judge_that_is_down_stops_the_step_and_keeps_the_answers(self, server, base, data, tmp_path) -> None:
        server.reply = lambda number, _: "[[5]]" if number <= 2 else (500, b"oh", {})
        with pytest.raises(S2FTError, match="left 3 answers in a row unrated: the judge answered with HTTP 500: oh"):
            rated(base, data, tmp_path / "out", server.judge(attempts=1))
        assert len(server.requests) == 5
        server.reply = lambda *_: "[[6]]"
        report = rated(base, data, tmp_path / "out", server.judge())
        assert (report.ratings[0]["rated"], len(server.requests)) == (8, 5 + 6)

    def test_an_answer_that_is_written_anew_is_rated_anew(self, server, base, data, tmp_path) -> None:
        rated(base, data, tmp_path / "out", server.judge())
        path = tmp_path / "out" / "base" / "mt-bench.jsonl"
        row = json.loads(path.read_text().splitlines()[1])
        with path.open("a") as file:
            file.write(json.dumps({**row, "output": "another answer"}) + "\n")
        rated(base, data, tmp_path / "out", server.judge())
        assert len(server.requests) == 10  # the first turn, and the second, which builds on it

    def test_the_command_takes_the_judge_from_the_environment(self, server, base, data, tmp_path, monkeypatch) -> None:
        words = ["eval", "--model", base, "--suite", "instruction", "--data", data, "--output", str(tmp_path / "out")]
        words += ["--max-new-tokens", "3", "--precision", "fp32", "--prompt", "chat"]
        for name in ("S2FT_JUDGE_URL", "S2FT_JUDGE_MODEL"):
            monkeypatch.delenv(name, raising=False)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.exception
        assert "not rated yet" in result.output
        monkeypatch.setenv("S2FT_JUDGE_URL", server.url)
        monkeypatch.setenv("S2FT_JUDGE_MODEL", "a/b c")
        result = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "a.json")])
        assert result.exit_code == 0, result.exception
        assert "7.00" in result.output
        assert json.loads((tmp_path / "a.json").read_text())["settings"]["judge"] == "a/b c"
        assert (tmp_path / "out" / "base" / "mt-bench.a-b-c.jsonl").is_file()
