"""Answers of a guard: the tokens that may follow are exactly those of well-formed answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from edgellama.model.guard import Category, Conversation, Guard, GuardAnswer

PLAIN = Conversation(("", ""), ("", ""), "", "", False)
# The code S1 begins the code S10, and the tokens of both begin alike.
GUARD = Guard(
    PLAIN,
    (
        Category("S1", "one", (7, 3, 1), (8, 3, 1)),
        Category("S2", "two", (7, 3, 2), (8, 3, 2)),
        Category("S10", "ten", (7, 3, 1, 0), (8, 3, 1, 0)),
    ),
    (5, 6),
    (9,),
)


def written(answer: GuardAnswer | None, before: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All whole answers, as tokens."""
    if answer is None:
        yield before
        return
    for token in answer.allowed():
        yield from written(answer.then(token), (*before, token))


def test_allowed_tokens_write_every_answer_and_no_other() -> None:
    codes = {c.code: c for c in GUARD.categories}
    expected = set()
    for count in (1, 2, 3):
        for chosen in permutations(codes, count):
            tokens = [*GUARD.rest, *codes[chosen[0]].first]
            for code in chosen[1:]:
                tokens += codes[code].further
            expected.add((*tokens, *GUARD.end))
    found = list(written(GUARD.start(), ()))
    assert set(found) == expected and len(found) == len(expected) == 15


def after(answer: GuardAnswer, *tokens: int) -> GuardAnswer:
    for token in tokens:
        following = answer.then(token)
        assert following is not None
        answer = following
    return answer


def test_codes_of_an_answer() -> None:
    one = after(GUARD.start(), 5, 6, 7, 3, 1)
    assert one.codes == ("S1",) and one.allowed() == (0, 8, 9)
    two = after(one, 0, 8, 3)
    assert two.codes == ("S10",), "the code that is not whole does not count"
    assert two.allowed() == (1, 2)
    assert after(two, 2).codes == ("S10", "S2") and one.then(9) is None


def test_a_guard_survives_json() -> None:
    assert Guard.from_dict(GUARD.to_dict()) == GUARD
    assert GUARD.tokens == (0, 1, 2, 3, 5, 6, 7, 8, 9)
