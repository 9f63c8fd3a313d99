from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from sfl.fed_server.seen import Seen

IDS = st.one_of(
    st.integers(0, 12).map(lambda number: f"s/{number}"),
    st.sampled_from(["s", "s/", "/3", "t/3", "s/03", "s/x", "s/-1", "s/٣", "", "a/b/2", f"s/{10**30}"]),
)


@given(st.lists(st.tuples(st.sampled_from("ab"), IDS)))
def test_it_knows_what_a_set_knows(added: list[tuple[str, str]]) -> None:
    seen, plain = Seen(), set[tuple[str, str]]()
    for key in added:
        assert (key in seen) == (key in plain)
        seen.add(*key)
        plain.add(key)
        assert key in seen
    assert all(((device, f"s/{number}") in seen) == ((device, f"s/{number}") in plain) for device in "ab" for number in range(15))


def test_a_million_submissions_take_no_more_memory_than_one() -> None:
    seen = Seen()
    for number in range(5, 100_001):
        seen.add("a", f"session/{number + 1 if number % 2 else number - 1}")  # each two in the wrong order
    assert ("a", "session/99998") in seen and ("a", "session/3") not in seen
    assert sum(sys.getsizeof(kept) for kept in vars(seen).values()) < 1000
    assert not seen._others and not seen._odd
