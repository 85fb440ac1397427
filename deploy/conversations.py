"""The demo's conversations, and the most that any prefix cache could make of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM_PROMPT = (
    "You are the night clerk of a small observatory library. Visitors send you short questions about star charts, "
    "meteor logs, lens grinding and the weather over the dome. Answer briefly and courteously, cite the shelf where "
    "the log lies, and never invent a reading that no observer has signed. When a question concerns the great "
    "refractor, remind the visitor that the dome opens at dusk and closes at the first bell of the morning watch. "
    "Keep to the units of the old catalogue: arc minutes for size, hours of right ascension, degrees of declination."
)

_SUBJECTS = (
    "the comet of the long winter", "the double star near the Lyre", "the dark lanes of the Swan", "the spring meteors",
    "the cracked flint lens", "the pendulum clock in the cellar", "the southern horizon survey", "the lunar eclipse",
)  # fmt: skip
_QUESTIONS = (
    "Which shelf holds the observer's notes on {subject}, and who signed the first page?",
    "Thank you. Compare that with what was written about {subject} in the following year.",
    "One reading looks doubtful to me. How was {subject} measured, and with which instrument?",
    "Please add the weather of those nights to what you told me about {subject}.",
    "Summarise all of it in two sentences, so that I can enter {subject} in the register.",
)


_LOG_LINES = 8
_READING_S = (0.2, 1.2)


def user_message(session: int, turn: int) -> str:
    """What the user of a session says in a turn (both counted from 0): a page of a log, and a question about it."""
    subject = _SUBJECTS[session % len(_SUBJECTS)]
    question = _QUESTIONS[turn % len(_QUESTIONS)].format(subject=subject)
    rng = random.Random(1000 * session + turn)  # noqa: S311 - a made-up log
    page = "\n".join(_log_line(rng) for _ in range(_LOG_LINES))
    return f"Visitor {session + 1}, page {turn + 1} of the log:\n{page}\n{question}"


def reading_time_s(session: int, turn: int) -> float:
    """Seconds that a user takes before a turn. Without them sessions would ask in lockstep, as no people do."""
    return random.Random(f"{session} {turn}").uniform(*_READING_S)  # noqa: S311 - made-up people


def _log_line(rng: random.Random) -> str:
    hour, minute = rng.randrange(24), rng.randrange(60)
    place = f"RA {rng.uniform(0, 24):.2f} h, dec {rng.uniform(-90, 90):+.1f}"
    return f"{hour:02d}:{minute:02d} {place}, seeing {rng.randrange(1, 6)}/5"


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """The tokens of one turn: prompt, then answer."""

    session: int
    turn: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def most_cached_tokens(turns: Sequence[TurnTokens], block_size: int) -> dict[tuple[int, int], int]:
    """Prompt tokens that one cache of unlimited size, shared by all, could hold for each (session, turn).

    Turns of one session follow one another; the sessions run side by side, so a turn finds the earlier turns of its
    own session whole and, of the others, what ended in an earlier round. Only full blocks count, and the last token
    of a prompt is always computed.
    """
    seen: set[tuple[int, ...]] = set()
    most: dict[tuple[int, int], int] = {}
    for round_ in sorted({entry.turn for entry in turns}):
        entries = [entry for entry in turns if entry.turn == round_]
        for entry in entries:
            limit = (len(entry.prompt) - 1) // block_size
            depth = 0
            while depth < limit and entry.prompt[: (depth + 1) * block_size] in seen:
                depth += 1
            most[entry.session, entry.turn] = depth * block_size
        for entry in entries:
            # The last token of an answer is never fed back to the model, so it has no KV.
            tokens = entry.prompt + entry.answer[:-1]
            seen.update(tokens[: (at + 1) * block_size] for at in range(len(tokens) // block_size))
    return most
