"""Running a server: who may ask, how much, what happens to slow, broken and leaving clients, and how it stops."""

import json
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from live_server import KEY, Live, embedded, live, wait_for
from s2ft.serve import limits, server
from s2ft.serve.adapters import Adapters
from s2ft.serve.logs import AsJson

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = {"model": "base", "prompt": "reverse: planet\n", "max_tokens": 4, "temperature": 0}
LONG = {**ASKED, "max_tokens": 1000}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, one whose weights are cut short, and what is no adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    embedded(folder)
    shutil.copytree(folder / "user0", folder / "broken")
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(folder / "user0", folder / ".unfinished-user0")
    (folder / "empty").mkdir()
    (folder / "elsewhere").symlink_to("/etc")
    return folder


@pytest.fixture(scope="module")
def endless(root: Path) -> Iterator[Live]:
    """Answers go on until their limit; two at once, and one that waits."""
    with live(root, endless=True, rows=2, queue=1, max_body=100_000) as found:
        yield found


def names(found: Live) -> list[str]:
    return [model["id"] for model in found.ask("GET", "/v1/models")[1]["data"]]


class TestKeys:
    def test_every_route_but_health_needs_one(self, root: Path) -> None:
        with live(root, keys=(KEY, "another-key")) as found:
            routes = [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("GET", "/nowhere")]
            routes += [("POST", "/v1/chat/completions"), ("PUT", "/v1/adapters/a"), ("GET", "/openapi.json")]
            for method, path in routes:
                for header in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer ", "Bearer \xff\xfe"):
                    status, body, _ = found.ask(method, path, b"x" * 10, Authorization=header)
                    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert found.ask("GET", "/health")[0] == 200
            assert found.ask("GET", "/metrics", Authorization="bearer another-key")[0] == 200
            with found.client() as client:
                assert client.completions.create(**ASKED).choices[0].text == "tena"
            with found.client(api_key="wrong-key") as client, pytest.raises(openai.AuthenticationError):
                client.completions.create(**ASKED)

    def test_without_one_only_this_machine_is_the_host(self, endless: Live) -> None:
        """A web page elsewhere, whose name leads to 127.0.0.1, cannot ask."""
        assert endless.ask("GET", "/v1/models", Host="evil.example")[0] == 400
        assert endless.ask("GET", "/v1/models", Host="localhost:1")[0] == 200


class TestLimits:
    @pytest.mark.parametrize(
        ("body", "headers", "status"),
        [
            (b"x" * 200_000, {}, 413),
            (b"{}", {"Content_Length": "-1"}, 400),
            (b"{}", {"Content_Type": "text/plain"}, 415),
            (b"{", {}, 400),
            (b"", {}, 400),
            (b"[]", {}, 400),
            (b'"x"', {}, 400),
            (b"[" * 50_000, {}, 400),
            (b'{"model": "base", "prompt": "x", "temperature": NaN}', {}, 400),
            (b'{"model": "base", "prompt": "x", "temperature": 1e999}', {}, 400),
            (b'{"model": "base", "prompt": "x", "seed": 1' + b"0" * 5000 + b"}", {}, 400),
            (b'{"model": "base", "prompt": "\xff"}', {}, 400),
            (b'{"model": "base", "prompt": "\\ud800", "max_tokens": 1}', {}, 400),
            (b'{"model": "\\u0000", "prompt": "x"}', {}, 404),
        ],
    )
    def test_what_cannot_be_read_has_a_proper_status(
        self, endless: Live, body: bytes, headers: dict[str, str], status: int
    ) -> None:
        assert endless.ask("POST", "/v1/completions", body, **headers)[0] == status

    def test_other_addresses_and_methods_have_one_too(self, endless: Live) -> None:
        for method, path, wanted in (
            ("GET", "/v1/x", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/health", 405),
        ):
            status, body, _ = endless.ask(method, path)
            assert status == wanted
            assert body["error"]["message"]
        assert endless.ask("PUT", "/v1/adapters/user0")[0] == 404  # off by default

    def test_a_body_that_comes_too_slowly_is_not_waited_for(
        self, endless: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
        with socket.create_connection(("127.0.0.1", endless.port)) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            client.sendall(b"Content-Length: 100\r\n\r\n{")
            assert client.recv(1000).startswith(b"HTTP/1.1 408")

    def test_headers_that_come_too_slowly_are_not_waited_for(
        self, endless: Live, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
        with socket.create_connection(("127.0.0.1", endless.port)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
            client.settimeout(20)
            assert client.recv(1000) == b""
        assert endless.ask("GET", "/health")[0] == 200

    def test_more_than_may_wait_are_told_to_come_again(self, endless: Live) -> None:
        with endless.client() as client:
            streams = [client.completions.create(**{**LONG, "model": name}, stream=True) for name in ("base", "user0")]
            for stream in streams:
                next(iter(stream))
            waiting = threading.Thread(target=endless.ask, args=("POST", "/v1/completions", ASKED))
            waiting.start()
            wait_for(lambda: len(endless.service._scheduler._waiting) == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**ASKED)
            assert caught.value.response.headers["Retry-After"] == "1"
            for stream in streams:
                stream.close()
            waiting.join()
        wait_for(lambda: endless.under_way == 0)

    def test_a_request_has_only_so_much_time(self, root: Path) -> None:
        with live(root, endless=True, timeout=0.3) as found:
            status, body, _ = found.ask("POST", "/v1/completions", {**LONG, "n": 8})
            assert (status, body["error"]["code"]) == (504, "timeout")
            with found.client() as client, pytest.raises(openai.APIError, match="longer than this server allows"):
                list(client.completions.create(**LONG, n=8, stream=True))
            wait_for(lambda: found.under_way == 0)


def send(client: socket.socket, asked: dict[str, Any]) -> None:
    """A request, without waiting for what comes back."""
    body = json.dumps(asked).encode()
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    client.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)


class TestClientsThatLeave:
    def test_their_answers_are_given_up(self, endless: Live) -> None:
        for stream in (False, True):
            with socket.create_connection(("127.0.0.1", endless.port)) as client:
                send(client, {**LONG, "stream": stream})
                wait_for(lambda: endless.under_way == 1)
            wait_for(lambda: endless.under_way == 0)

    @pytest.mark.parametrize("stream", [False, True])
    def test_who_leaves_before_the_first_token_waits_no_more(
        self, endless: Live, stream: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scheduler = endless.service._scheduler
        monkeypatch.setattr(scheduler, "_has_room", lambda *_: False)
        with socket.create_connection(("127.0.0.1", endless.port)) as client:
            send(client, {**LONG, "stream": stream})
            wait_for(lambda: len(scheduler._waiting) == 1)
        wait_for(lambda: not scheduler._waiting)

    def test_who_does_not_read_is_cut_off(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "GRACE", 0.1)
        with (
            live(root, endless=True, timeout=1.0, rows=64) as found,
            socket.create_connection(("127.0.0.1", found.port)) as client,
        ):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            send(client, {**LONG, "stream": True, "n": 64, "logprobs": 5})
            wait_for(lambda: found.under_way > 0)
            wait_for(lambda: found.under_way == 0 and not found.server.server_state.tasks)


class TestAdapters:
    def test_only_whole_adapters_of_the_folder_are_listed(self, endless: Live) -> None:
        assert names(endless) == ["base", "broken", "user0", "user1"]

    def test_a_broken_one_fails_without_a_word_of_where_it_lies(
        self, endless: Live, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for how in ({"model": "broken"}, {"model": "user0+broken"}, {"fuse": {"broken": 0.5}}):
            status, body, _ = endless.ask("POST", "/v1/completions", {**ASKED, **how})
            assert status == (500 if how == {"model": "broken"} else 400)
            assert str(root) not in str(body)
            assert "Traceback" not in str(body)
        assert str(root / "broken") in caplog.text
        assert endless.ask("POST", "/v1/completions", {**ASKED, "model": "user0"})[0] == 200

    def test_one_that_is_replaced_is_read_anew(self, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root / "user0", tmp_path / "mine")
        with live(tmp_path) as found:

            def says() -> Any:
                body = {**ASKED, "model": "mine", "prompt": "x", "max_tokens": 30, "logprobs": 0}
                return found.ask("POST", "/v1/completions", body)[1]["choices"][0]["logprobs"]["token_logprobs"]

            first = says()
            shutil.copytree(root / "user1", tmp_path / ".next")
            (tmp_path / "mine").rename(tmp_path / ".last")
            (tmp_path / ".next").rename(tmp_path / "mine")
            assert says() != first
            wait_for(lambda: len([*found.service._scheduler._pool]) == 1)
            shutil.rmtree(tmp_path / "mine")
            assert found.ask("POST", "/v1/completions", {**ASKED, "model": "mine"})[0] == 404

    def test_one_that_is_replaced_through_a_link_is_read_anew(self, root: Path, tmp_path: Path) -> None:
        for version, name in ((".v1", "user0"), (".v2", "user1")):
            shutil.copytree(root / name, tmp_path / version)
        link = tmp_path / "mine"
        link.symlink_to(".v1")
        retired: list[str] = []
        adapters = Adapters("base", tmp_path, lambda key, then: retired.append(key))
        first = adapters.choose({"mine": 1.0})
        assert first is not None
        assert adapters.choose({"mine": 1.0}) is first
        (tmp_path / "next").symlink_to(".v2")
        (tmp_path / "next").rename(link)
        second = adapters.choose({"mine": 1.0})
        assert (second and second.folder, retired) == (tmp_path / ".v2", [first.key])
        shutil.rmtree(tmp_path / ".v1")
        assert adapters.choose({"mine": 1.0}) is second
        (tmp_path / ".v2").rename(tmp_path / ".v3")  # the same files, elsewhere
        (tmp_path / "next").symlink_to(".v3")
        (tmp_path / "next").rename(link)
        third = adapters.choose({"mine": 1.0})
        assert second is not None
        assert (third and third.folder, retired) == (tmp_path / ".v3", [first.key, second.key])
        adapters.close()

    def test_they_come_and_go_at_run_time_where_that_is_allowed(self, root: Path, tmp_path: Path) -> None:
        with live(tmp_path, allow_loading=True) as found:
            assert names(found) == ["base"]
            assert found.ask("PUT", "/v1/adapters/new")[0] == 404
            shutil.copytree(root / "user0", tmp_path / "new")
            assert found.ask("PUT", "/v1/adapters/new")[1]["parent"] == "base"
            assert found.ask("POST", "/v1/completions", {**ASKED, "model": "new"})[0] == 200
            assert found.ask("DELETE", "/v1/adapters/new")[1]["deleted"] is True
            assert found.ask("DELETE", "/v1/adapters/new")[0] == 404
            assert found.ask("POST", "/v1/completions", {**ASKED, "model": "new"})[0] == 404
            for name in ("..", "..%2F..%2Fetc", ".hidden", "base", "%00"):
                assert found.ask("PUT", f"/v1/adapters/{name}")[0] == 404

    def test_one_that_is_taken_away_during_a_request_is_unknown(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with live(root, allow_loading=True) as found:
            read = found.service._token_ids

            def read_meanwhile(asked: Any) -> list[list[int]]:
                assert found.ask("DELETE", "/v1/adapters/user0")[0] == 200
                return read(asked)

            monkeypatch.setattr(found.service, "_token_ids", read_meanwhile)
            status, body, _ = found.ask("POST", "/v1/completions", {**ASKED, "model": "user0"})
        assert (status, body["error"]["code"]) == (404, "model_not_found")

    def test_a_fusion_that_several_ask_for_at_once_is_made_once(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers: list[int] = []
        with live(root) as found:
            made, fused = [], found.service.adapters.fused

            def slowly(recipe: Any) -> Any:
                made.append(recipe)
                wait_for(lambda: found.service._fusing and len(asking) == 5)
                time.sleep(0.3)
                return fused(recipe)

            monkeypatch.setattr(found.service.adapters, "fused", slowly)
            body = {**ASKED, "fuse": {"user0": 1.25}}
            ask = lambda: answers.append(found.ask("POST", "/v1/completions", body)[0])  # noqa: E731
            asking = [threading.Thread(target=ask) for _ in range(5)]
            for thread in asking:
                thread.start()
            for thread in asking:
                thread.join()
            assert not found.service._fusing
        assert (answers, made) == ([200] * 5, [{"user0": 1.25}])

    def test_many_fusions_leave_no_more_than_a_few_files(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("s2ft.serve.adapters.FUSIONS", 2)
        with live(root) as found:
            for number in range(5):
                body = {**ASKED, "fuse": {"user0": 1.5 + number}}
                assert found.ask("POST", "/v1/completions", body)[0] == 200
            scratch = Path(found.service.adapters._scratch.name)
            wait_for(lambda: len([*scratch.iterdir()]) == 2 == len([*found.service._scheduler._pool]))
        assert not scratch.exists()


class TestStopping:
    def test_what_is_under_way_is_answered(self, root: Path) -> None:
        with live(root, endless=True) as found:
            answers: list[Any] = []
            ask = lambda: answers.append(found.ask("POST", "/v1/completions", {**LONG, "max_tokens": 200}))  # noqa: E731
            asking = [threading.Thread(target=ask) for _ in range(3)]
            for thread in asking:
                thread.start()
            wait_for(lambda: found.under_way == 3)
            found.stop()
            for thread in asking:
                thread.join()
        assert [(status, body["usage"]["completion_tokens"]) for status, body, _ in answers] == [(200, 200)] * 3
        with pytest.raises(ConnectionRefusedError):
            found.ask("GET", "/health")

    def test_what_takes_too_long_is_refused(self, root: Path) -> None:
        with live(root, endless=True, drain=0.1, rows=1) as found:
            answers: list[Any] = []
            ask = lambda: answers.append(found.ask("POST", "/v1/completions", {**LONG, "n": 20}))  # noqa: E731
            asking = threading.Thread(target=ask)
            asking.start()
            wait_for(lambda: found.under_way == 1)
            found.stop()
            asking.join()
        status, body, headers = answers[0]
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "stopping", "1")


def test_the_log_has_a_line_for_each_request_and_nothing_of_what_was_said(
    endless: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "s2ft.serve")
    endless.ask("POST", "/v1/completions", {**ASKED, "model": "user0", "prompt": "a secret"})
    endless.ask("POST", "/v1/completions", {**ASKED, "model": "a secret"})
    endless.ask("POST", "/v1/completions", b'{"a secret')
    endless.ask("GET", "/a-secret?a=secret")
    wait_for(lambda: len(caplog.records) == 4)
    lines = [json.loads(AsJson().format(record)) for record in caplog.records]
    assert [(line["path"], line["status"]) for line in lines] == [
        *[("/v1/completions", status) for status in (200, 404, 400)],
        ("other", 404),
    ]
    assert {key: lines[0][key] for key in ("model", "prompt_tokens", "answer_tokens")} == {
        "model": "user0",
        "prompt_tokens": 8,
        "answer_tokens": 4,
    }
    assert "secret" not in str(lines)


def test_metrics_count_requests_tokens_and_adapters(root: Path) -> None:
    with live(root) as found:
        for _ in range(3):
            found.ask("POST", "/v1/completions", {**ASKED, "model": "user0"})
        text = found.ask("GET", "/metrics")[1]
        for line in (
            's2ft_requests_total{path="/v1/completions",status="200"} 3.0',
            's2ft_tokens_total{kind="prompt"} 48.0',
            's2ft_tokens_total{kind="answer"} 12.0',
            's2ft_adapter_total{tier="disk"} 1.0',
            's2ft_adapter_total{tier="device"} 2.0',
            "s2ft_waiting 0.0",
        ):
            assert line in text


def test_tokens_of_an_answer_that_is_cut_short_count(root: Path) -> None:
    with live(root, endless=True) as found:
        with found.client() as client:
            stream = client.completions.create(**LONG, stream=True)
            for _ in range(3):
                next(stream)
            stream.close()
        wait_for(lambda: 's2ft_tokens_total{kind="prompt"} 16.0' in found.ask("GET", "/metrics")[1])
        told = re.search(r's2ft_tokens_total\{kind="answer"\} (\S+)', found.ask("GET", "/metrics")[1])
    assert told is not None
    assert 3 <= float(told[1]) < LONG["max_tokens"]


def test_an_engine_that_died_is_not_healthy(root: Path) -> None:
    with live(root) as found:
        found.service.stop()
        time.sleep(0.05)
        assert found.ask("GET", "/health")[0] == 503
        assert found.ask("POST", "/v1/completions", ASKED)[0] == 503
