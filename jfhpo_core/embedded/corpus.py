"""The tasks of the laptop demo: prompts, right answers, careless demonstrations, and the held-out split.

A base model is fine-tuned on *demonstrations*, which are right only with a small probability q and otherwise one of
several careless ways of answering. It thus has every skill that the task needs and no habit of using the right one;
reinforcement learning with a verifiable reward teaches that habit. This is what makes a real, if tiny, response
surface: sampled accuracy starts far below one and rises within some tens of steps at a good learning rate.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from functools import cache, cached_property
from itertools import permutations, product
from typing import TypedDict

HELD_OUT_SHARE = 8
"""One equivalence class of prompts in this many is held out."""


class Row(TypedDict):
    """One line of `train.jsonl` or `heldout.jsonl`."""

    prompt: str
    answer: str


class Task(ABC):
    """A family of prompts.

    Attributes:
        name: folder name under `tasks/` and `families/`.
        right_share: q, the probability that a demonstration is right on purpose.
        answer_length: characters of the longest answer; a completion is one token longer (`<eos>`).
        one_answer: whether each prompt has exactly one right answer, and the reward is one for it and else zero.
    """

    name: str
    right_share: float
    answer_length: int
    one_answer = True

    @abstractmethod
    def draw(self, rng: random.Random) -> str:
        """A prompt, uniform over the task."""

    @abstractmethod
    def answer(self, prompt: str) -> str:
        """The right answer, or a fixed one of them."""

    def right(self, prompt: str, rng: random.Random) -> str:
        """The right answer, or a random one of them."""
        return self.answer(prompt)

    @abstractmethod
    def careless(self, prompt: str, rng: random.Random) -> str:
        """An answer given without heeding what the prompt asks; now and then it is right by chance."""

    @abstractmethod
    def canonical(self, prompt: str) -> str:
        """The equivalence class of a prompt: prompts of one class are all held out or all for training."""

    def demonstration(self, prompt: str, rng: random.Random, right_share: float) -> str:
        """An answer as the base corpus has it: right with probability `right_share`, else careless."""
        return self.right(prompt, rng) if rng.random() < right_share else self.careless(prompt, rng)

    def is_held_out(self, prompt: str) -> bool:
        """Whether the prompt belongs to the held-out split: a hash of its class alone, so no draw order matters."""
        digest = hashlib.sha256(f"{self.name}:{self.canonical(prompt)}".encode()).digest()
        return digest[0] % HELD_OUT_SHARE == 0

    def draw_train(self, rng: random.Random) -> str:
        """A prompt, uniform over the training split."""
        while self.is_held_out(prompt := self.draw(rng)):
            pass
        return prompt

    @property
    @abstractmethod
    def prompts(self) -> list[str]:
        """Every prompt of the task, in a fixed order."""

    def rows(self, count: int, *, held_out: bool, seed: int) -> list[Row]:
        """`count` different rows of one split, in random order; the whole split where it is smaller."""
        rng = random.Random(f"{self.name}:{held_out}:{seed}")  # noqa: S311  no secret depends on it
        split = [prompt for prompt in self.prompts if self.is_held_out(prompt) == held_out]
        return [Row(prompt=prompt, answer=self.answer(prompt)) for prompt in rng.sample(split, min(count, len(split)))]


class Instruct(Task):
    """Arrange five digits as an instruction letter asks: `a` ascending, `d` descending, `c` copy, `r` reverse.

    A careless demonstration follows a random one of the four instructions. A base that has learnt the corpus well
    answers about q + (1 - q) / 4 of the prompts right.

    >>> Instruct().answer("a37451=")
    '13457'
    """

    name = "instruct"
    right_share = 0.15
    answer_length = 5
    letters = "adcr"

    @staticmethod
    def arrange(letter: str, digits: str) -> str:
        """The digits after one of the four instructions."""
        match letter:
            case "a":
                return "".join(sorted(digits))
            case "d":
                return "".join(sorted(digits, reverse=True))
            case "r":
                return digits[::-1]
            case _:
                return digits

    def draw(self, rng: random.Random) -> str:
        return f"{rng.choice(self.letters)}{rng.randrange(10**self.answer_length):0{self.answer_length}d}="

    def answer(self, prompt: str) -> str:
        return self.arrange(prompt[0], prompt[1:-1])

    def careless(self, prompt: str, rng: random.Random) -> str:
        return self.arrange(rng.choice(self.letters), prompt[1:-1])

    def canonical(self, prompt: str) -> str:
        """The sorted digits: neither another order of the same digits nor another letter crosses the split."""
        return "".join(sorted(prompt[1:-1]))

    @cached_property
    def prompts(self) -> list[str]:
        return [
            f"{letter}{n:0{self.answer_length}d}=" for letter in self.letters for n in range(10**self.answer_length)
        ]


class Arithmetic(Task):
    """Add or subtract two numbers of two digits; the answer has three digits, the least significant one first.

    That order lets a model of a tenth of a million parameters carry as it writes. A careless demonstration takes the
    other operation, or works digit by digit and forgets every carry (which is right by chance where nothing carries).

    >>> Arithmetic().answer("47+38=")
    '580'
    """

    name = "arithmetic"
    right_share = 0.1
    answer_length = 3

    @staticmethod
    def _parts(prompt: str) -> tuple[int, str, int]:
        return int(prompt[:2]), prompt[2], int(prompt[3:5])

    def _write(self, value: int) -> str:
        return f"{value:0{self.answer_length}d}"[::-1]

    def draw(self, rng: random.Random) -> str:
        return rng.choice(self.prompts)

    def answer(self, prompt: str) -> str:
        left, sign, right = self._parts(prompt)
        return self._write(left + right if sign == "+" else left - right)

    def careless(self, prompt: str, rng: random.Random) -> str:
        left, sign, right = self._parts(prompt)
        if rng.random() < 0.5:
            return self._write(abs(left - right) if sign == "+" else left + right)
        tens, units = (
            (a + b if sign == "+" else a - b) % 10 for a, b in ((left // 10, right // 10), (left % 10, right % 10))
        )
        return self._write(10 * tens + units)

    def canonical(self, prompt: str) -> str:
        """The two numbers in ascending order: neither a+b, b+a nor their difference crosses the split."""
        left, _, right = self._parts(prompt)
        return f"{min(left, right):02d},{max(left, right):02d}"

    @cached_property
    def prompts(self) -> list[str]:
        pairs = list(product(range(100), repeat=2))
        return [f"{a:02d}+{b:02d}=" for a, b in pairs] + [f"{a:02d}-{b:02d}=" for a, b in pairs if a >= b]


class Countdown(Task):
    """Write a number as a sum or difference of two to four digits, without three digits that the prompt bars.

    A prompt has many right answers of different lengths: for `17!358=` they are `9+9-1`, `9+7+1`, `9+4+4` and others.
    A careless demonstration aims at a number near by, pays no heed to the bars, or has a slip of the pen.
    """

    name = "countdown"
    right_share = 0.12
    answer_length = 7
    one_answer = False
    numbers = range(2, 31)
    digits = "123456789"
    barred = 3

    nearby = 9
    """How far off the mark a careless demonstration may be."""

    fewest_answers = 5
    """Prompts with fewer right answers are left out."""

    def draw(self, rng: random.Random) -> str:
        return rng.choice(self.prompts)

    def answer(self, prompt: str) -> str:
        return self.right(prompt, random.Random(prompt))  # noqa: S311  no secret depends on it

    def right(self, prompt: str, rng: random.Random) -> str:
        number, barred = self._parts(prompt)
        return self._expression(number, barred, rng)

    def careless(self, prompt: str, rng: random.Random) -> str:
        number, barred = self._parts(prompt)
        match rng.choice(("near", "heedless", "slip")):
            case "near":
                near = [number + error for error in range(-self.nearby, self.nearby + 1) if error]
                return self._expression(rng.choice([one for one in near if _expressions(one, barred)]), barred, rng)
            case "heedless":
                return self._expression(number, frozenset(), rng)
            case _:
                right = self._expression(number, barred, rng)
                sign = rng.randrange(1, len(right), 2)
                before, after = right[:sign], right[sign + 1 :]
                return rng.choice((right[:-1], before + after, before + 2 * right[sign] + after))

    def canonical(self, prompt: str) -> str:
        """The number and the barred digits in ascending order."""
        number, barred = self._parts(prompt)
        return f"{number},{''.join(sorted(barred))}"

    @cached_property
    def prompts(self) -> list[str]:
        return [
            f"{number}!{''.join(barred)}="
            for number in self.numbers
            for barred in permutations(self.digits, self.barred)
            if sum(map(len, _expressions(number, frozenset(barred)))) >= self.fewest_answers
        ]

    @staticmethod
    def _parts(prompt: str) -> tuple[int, frozenset[str]]:
        number, barred = prompt.removesuffix("=").split("!")
        return int(number), frozenset(barred)

    @staticmethod
    def _expression(number: int, barred: frozenset[str], rng: random.Random) -> str:
        """A random expression, each length as likely as any other."""
        return rng.choice(rng.choice(_expressions(number, barred)))


@cache
def _expressions(number: int, barred: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """The expressions of two to four digits with this value and none of the barred digits, by length."""
    by_length = _all_expressions().get(number, {}).values()
    allowed = (tuple(text for text in texts if barred.isdisjoint(text)) for texts in by_length)
    return tuple(texts for texts in allowed if texts)


@cache
def _all_expressions() -> dict[int, dict[int, list[str]]]:
    """Every sum and difference of two to four digits, by value and count of digits."""
    found: dict[int, dict[int, list[str]]] = {}
    for count in (2, 3, 4):
        for first, *digits in product(range(1, 10), repeat=count):
            for signs in product((1, -1), repeat=count - 1):
                rest = [sign * digit for sign, digit in zip(signs, digits, strict=True)]
                text = str(first) + "".join(f"{digit:+d}" for digit in rest)
                found.setdefault(first + sum(rest), {}).setdefault(count, []).append(text)
    return found


TASKS: dict[str, Task] = {task.name: task for task in (Instruct(), Arithmetic(), Countdown())}
