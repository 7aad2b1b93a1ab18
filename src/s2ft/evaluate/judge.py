"""A judge: any server that speaks OpenAI's chat completions, asked for a rating from 1 to 10.

    POST {url}/chat/completions   {"model", "temperature": 0, "messages"}   →   "... Rating: [[7]]"   →   7

Failures that may be temporary are retried, after a pause that doubles each time or that the server asks for: a server that is
down, slow or rate-limiting, an answer that is not JSON or holds no rating. A refused key or a wrong address is an error at
once. The key comes from the environment, goes into one header, and is written nowhere: it is cut out of what the judge says, as
are long parts of it, since servers repeat keys, sometimes abbreviated.
"""

from __future__ import annotations

import html
import json
import os
import re
import time
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.extras import from_extra

if TYPE_CHECKING:
    from openai import APIStatusError

URL, MODEL, KEY = "S2FT_JUDGE_URL", "S2FT_JUDGE_MODEL", "S2FT_JUDGE_KEY"
LOWEST, HIGHEST = 1, 10

_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_PASSING = (408, 409, 425, 429)  # temporary, as all from 500 on
_UNUSABLE = (401, 403, 404, 405)  # the same for every question
_LONGEST_PAUSE = 60.0  # seconds
_SHOWN = 400  # characters of a refusal
_PART = 8  # a run of so many characters of a key is hidden


class NoRating(Exception):
    """The judge gave no rating for this answer in any attempt."""


class JudgeDown(NoRating):
    """The judge did not answer at all, so the next question is likely to fail too."""


class _Passing(Exception):
    """A failure that may be temporary; `pause` is what the server asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float | None = None, down: bool = True) -> None:
        super().__init__(reason)
        self.pause, self.down = pause, down


@dataclass(frozen=True)
class Judge:
    """A judge: its address, its model, and how long and how often it is asked."""

    url: str  # up to and with /v1
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0  # seconds, for one answer
    attempts: int = 5
    pause: float = 2.0  # seconds before the second attempt

    def rate(self, messages: list[dict[str, str]]) -> tuple[float, str]:
        """The rating, and the text that it stands in.

        Raises:
            NoRating: if there is none after all attempts; `JudgeDown` if that is for want of an answer.
            S2FTError: if the judge cannot be used at all.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return self._once(messages)
            except _Passing as failure:
                last = failure
            if attempt < self.attempts:
                time.sleep(min(_LONGEST_PAUSE, last.pause or self.pause * 2 ** (attempt - 1)))
        kind = JudgeDown if last.down else NoRating
        raise kind(f"{last} (tried {self.attempts} times)")

    def _once(self, messages: list[dict[str, str]]) -> tuple[float, str]:
        from openai import APIConnectionError, APIStatusError

        from s2ft.evaluate.judge_http import ask  # takes a second to import

        try:
            text = self._text(json.loads(ask(self.url, self.key, self.model, messages, self.timeout)))
        except APIStatusError as error:
            raise self._sorted(error) from None
        except APIConnectionError as error:  # no connection, a time-out, an answer cut short
            reason = self._clean(repr(error.__cause__ or error.message))
            raise _Passing(f"no answer from the judge: {reason}") from None
        except (ValueError, RecursionError):  # RecursionError: nested too deeply
            raise _Passing("the judge's answer is not JSON") from None
        rating = read_rating(text)
        if rating is None:
            end = self._clean(text)[-80:]
            raise _Passing(f"no rating [[{LOWEST}]] to [[{HIGHEST}]] in the judge's answer: {end!r}", down=False)
        return rating, self._clean(text)

    def _text(self, value: Any) -> str:
        try:
            text = value["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _Passing("the judge's answer is JSON, but no chat completion", down=False)
        return text

    def _sorted(self, error: APIStatusError) -> Exception:
        """The error that an HTTP status stands for."""
        code = error.status_code
        said = self._clean(error.response.text).strip()[:_SHOWN]
        reason = f"the judge answered with HTTP {code}{': ' if said else ''}{said}"
        if code in _PASSING or code >= 500:
            return _Passing(reason, _seconds(error.response.headers.get("Retry-After")))
        if code in _UNUSABLE or code < 400:
            return S2FTError(f"judge_url={self.url!r}, judge_model={self.model!r} cannot be used: {reason}")
        return NoRating(reason)

    def _clean(self, text: str) -> str:
        """The text without the key. Clean first, shorten after: otherwise a part of the key could stay."""
        return without_key(text, self.key) if self.key else text


def without_key(text: str, key: str) -> str:
    """The text with "***" for the key, as it is or as JSON, HTML and addresses write it, and for long parts of it.

    Example:
        >>> without_key("no key sk-12345/67890, nor sk-12345/6", "sk-12345/67890")
        'no key ***, nor ***'
    """
    spellings = {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), quote(key, safe=""), html.escape(key)}
    length = min(_PART, len(key))
    parts = {spelling[start : start + length] for spelling in spellings for start in range(len(spelling) - length + 1)}
    hidden = bytearray(len(text))
    for start in range(len(text) - length + 1):
        if text[start : start + length] in parts:
            hidden[start : start + length] = b"\1" * length
    runs = groupby(zip(hidden, text, strict=True), key=itemgetter(0))
    return "".join("***" if covered else "".join(letter for _, letter in run) for covered, run in runs)


def read_rating(text: str) -> float | None:
    """The last [[n]] with n from 1 to 10.

    Example:
        >>> read_rating("Not [[5]], since it errs. Rating: [[3]]"), read_rating("Rating: 7"), read_rating("[[11]]")
        (3.0, None, None)
    """
    found = [float(number) for number in _RATING.findall(text)]
    return found[-1] if found and LOWEST <= found[-1] <= HIGHEST else None


def find_judge(url: str | None = None, model: str | None = None) -> Judge | None:
    """The judge of these options, or else of the environment; None if neither names one.

    Raises:
        S2FTError: if only one of address and model is known, or either cannot be used.
    """
    url, model, key = url or os.environ.get(URL), model or os.environ.get(MODEL), os.environ.get(KEY) or None
    if not url and not model:
        return None
    if not url or not model:
        given, lacking = (
            (f"judge_url={_unsecret(url)!r}", "judge-model") if url else (f"judge_model={model!r}", "judge-url")
        )
        raise S2FTError(f"{given} alone is not enough: give --{lacking} too, or {URL} and {MODEL} in the environment")
    raise_together(
        [
            *([] if _is_address(url) else [f"judge_url={_unsecret(url)!r} must be like https://host/v1"]),
            *([f"{KEY} holds characters that no key has (its value is not shown)"] if key and not _is_key(key) else []),
        ]
    )
    with from_extra("eval", "a judge"):
        import openai  # noqa: F401 - before the answers are written, which may take hours
    return Judge(url, model, key)


def _is_address(url: str) -> bool:
    """Of http or https, with a host that has a name, and nothing beside host, port and path: no user, no query."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:  # a port that is no number, half of an IPv6 address
        return False
    named = ":" in host or all(0 < len(label) < 64 for label in host.split("."))
    plain = url.isascii() and url.isprintable() and not set(url) & set(" @?#\\")
    return parts.scheme in ("http", "https") and named and plain


def _unsecret(url: str) -> str:
    """An address as it may be shown: a user before the host and a query may hold a password."""
    return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", url, flags=re.DOTALL), flags=re.DOTALL)


def _is_key(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def _seconds(text: str | None) -> float | None:
    """Of the header Retry-After; its other form, a date, is left to our own pauses."""
    return float(text) if text and text.strip().isdigit() else None
