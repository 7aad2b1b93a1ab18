r"""Small text skills, made from a seed: what the embedded base model knows, and what it has yet to learn.

An example is one line that names a skill and gives its input, and the answer to it:

    {"prompt": "reverse: planet\n", "completion": "tenalp"}

The base model masters the old skills and has never seen a new one, so a fine-tuned model can be asked two things at
once: has it learned the new skill, and has it forgotten an old one? The old skills are of different kinds for that
reason: arithmetic, moving letters, comparing letters, rewriting letters, and facts that can only be remembered. A new
skill is like an old one, so that a minute of fine-tuning is enough to learn it: more facts, and counting on by one.

Which examples are for training and which for tests is a property of the prompt (a hash of it), not of the seed: no
two calls can ever put the same prompt on both sides. `recall` and `river` are the exceptions: there is nothing in a
fact from which another one could be derived, so the test asks for the very facts that were trained.

The studies (docs/studies.md) have skills of their own. They split the training side once more: learning rates are chosen on
`validation`, runs train on `fit`, and neither sees a prompt of the tests.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

Example = dict[str, str]  # {"prompt", "completion"}, the names that TRL expects
Split = Literal["train", "test", "fit", "validation"]  # train is fit and validation together

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
TEST_SHARE = 10  # one prompt in ten is for tests
FACTS = 64  # that the base model knows: countries and their capitals
NEW_FACTS = 32  # that it has never seen: rivers and the towns at their mouths


def split_of(prompt: str) -> Split:
    """The side of a prompt; Python's own hash() would differ from process to process."""
    return "test" if int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % TEST_SHARE == 0 else "train"


def belongs(prompt: str, split: Split) -> bool:
    """Whether a prompt is of this side; other bytes of its hash divide the training side into `fit` and `validation`."""
    if split in ("train", "test"):
        return split_of(prompt) == split
    for_tuning = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[8:16]) % TEST_SHARE == 0
    return split_of(prompt) == "train" and for_tuning == (split == "validation")


@dataclass(frozen=True)
class Skill:
    """A skill: how its inputs are drawn, and the answer to an input."""

    name: str
    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]
    held_out: bool = True  # False: the skill is recall, its test prompts are its training prompts

    def example(self, text: str) -> Example:
        r"""The example for one given input.

        >>> SKILLS["reverse"].example("planet")
        {'prompt': 'reverse: planet\n', 'completion': 'tenalp'}
        """
        return {"prompt": f"{self.name}: {text}\n", "completion": self.answer(text)}

    def examples(self, count: int, seed: int, split: Split = "train") -> list[Example]:
        """`count` examples of one side, drawn with replacement; the same on every machine for the same arguments."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: list[Example] = []
        while len(found) < count:
            example = self.example(self.draw(rng))
            if not self.held_out or belongs(example["prompt"], split):
                found.append(example)
        return found


def draw_word(rng: random.Random) -> str:
    """Four to eight letters, every third one a vowel on average."""
    return "".join(rng.choice(VOWELS if rng.random() < 0.2 else LETTERS) for _ in range(rng.randrange(4, 9)))


def draw_letters(length: int) -> Callable[[random.Random], str]:
    """Draws words of this length, any letter as often as another."""
    return lambda rng: "".join(rng.choices(LETTERS, k=length))


def draw_pair_word(rng: random.Random) -> str:
    """Four to eight letters, only two different ones."""
    return "".join(rng.choices(rng.sample(LETTERS, 2), k=rng.randrange(4, 9)))


def draw_sum(rng: random.Random) -> str:
    """Two numbers of two digits, such as 12+34."""
    return f"{rng.randrange(10, 100)}+{rng.randrange(10, 100)}"


def invent_names(count: int, syllables: int, seed: str) -> list[str]:
    """Distinct pronounceable names that mean nothing."""
    rng = random.Random(seed)
    names: dict[str, None] = {}  # a set that remembers its order
    while len(names) < count:
        names["".join(rng.choice("bdfgklmnprstvz") + rng.choice(VOWELS) for _ in range(syllables)).capitalize()] = None
    return list(names)


CAPITALS = dict(zip(invent_names(FACTS, 3, "countries"), invent_names(FACTS, 2, "cities"), strict=True))
RIVERS = dict(zip(invent_names(NEW_FACTS, 3, "rivers"), invent_names(NEW_FACTS, 2, "mouths"), strict=True))


def add(text: str) -> str:
    """The value of a sum.

    >>> add("12+34")
    '46'
    """
    left, right = text.split("+")
    return str(int(left) + int(right))


def _by_name(*skills: Skill) -> dict[str, Skill]:
    return {skill.name: skill for skill in skills}


_OLD = _by_name(
    Skill("add", draw_sum, add),
    Skill("reverse", draw_word, lambda text: text[::-1]),
    Skill("sort", draw_word, lambda text: "".join(sorted(text))),
    Skill("upper", draw_word, str.upper),
    Skill("recall", lambda rng: rng.choice(list(CAPITALS)), CAPITALS.__getitem__, held_out=False),
)
_NEW = _by_name(
    Skill("river", lambda rng: rng.choice(list(RIVERS)), RIVERS.__getitem__, held_out=False),
    Skill("next", lambda rng: str(rng.randrange(100, 1000)), lambda text: str(int(text) + 1)),
)

SKILLS: dict[str, Skill] = {**_OLD, **_NEW}
OLD_SKILLS: tuple[str, ...] = tuple(_OLD)  # the base model masters these
NEW_SKILLS: tuple[str, ...] = tuple(_NEW)  # the base model has never seen these; the first is the quickstart's

# Skills of the studies, as unknown to the base model as the new ones.
ENDS = Skill("ends", draw_word, lambda text: text[0] + text[-1])
BACK = Skill("back", draw_word, lambda text: text[::-1][:3])
STUDY_SKILLS: dict[str, Skill] = {**_by_name(ENDS, BACK), "river": SKILLS["river"]}

# Out of distribution. Near: `back` on lengths that it was not trained on. Far: old skills on words that neither the base
# model nor a fine-tuned one was trained on, and that the base model mostly gets right; knowing `back` is no help with them.
NEAR_SKILLS: dict[str, Skill] = {
    f"back, {length} letters": replace(BACK, draw=draw_letters(length)) for length in (3, 9)
}
FAR_SKILLS: dict[str, Skill] = {
    f"{name}, two letters": replace(SKILLS[name], draw=draw_pair_word) for name in ("reverse", "sort", "upper")
}
