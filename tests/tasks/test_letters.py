"""The letters task: its checker, its writers, its split, and rows in TRL's formats."""

import pytest

from tandem.tasks import letters


def test_checker_accepts_the_sorted_letters_and_nothing_else():
    assert letters.answer("hcafi>") == "acfhi"
    assert letters.check("hcafi>", "acfhi") == 1.0
    for wrong in ("", "acfh", "acfih", "acffhi", "acfhi ", "acfhi>", "hcafi", "acfhj"):
        assert letters.check("hcafi>", wrong) == 0.0


def test_reward_has_trls_form_and_agrees_with_the_checker():
    scores = letters.reward(prompts=["cbad>"] * 2, completions=["abcd", "abc"], completion_ids=[[1], [2]], other=[0, 0])
    assert scores == [1.0, 0.0]
    with pytest.raises(ValueError, match="zip"):
        letters.reward(["cbad>"], ["abcd", "abc"])


@pytest.mark.parametrize(
    ("completion", "distance"),
    [("acfhi", 0), ("acfh", 1), ("", 5), ("acfih", 2), ("aacfhi", 1), ("acfhj", 1), ("bdegj", 5), ("jacfhij", 2)],
)
def test_mistakes_are_counted_as_by_hand(completion, distance):
    assert letters.mistakes("hcafi>", completion) == distance


def test_prompts_are_well_formed():
    for prompt in letters.prompts(300, seed=0):
        body = prompt.removesuffix(">")
        assert prompt.endswith(">")
        assert 4 <= len(body) <= 6
        assert len(set(body)) == len(body)
        assert set(body) <= set(letters.LETTERS)


def test_splits_share_no_set_of_letters():
    train = {letters.answer(p) for p in letters.prompts(3000, seed=0)}
    held_out = {letters.answer(p) for p in letters.prompts(1000, seed=0, split="heldout")}
    assert len(train) > 500
    assert len(held_out) > 100
    assert not train & held_out
    assert letters.split_of("abcdef>") == letters.split_of("fedcba>")


def test_the_same_seed_gives_the_same_rows():
    # Written down from the first run: rows must not change with the machine, the Python version or the process.
    assert letters.prompts(3, seed=0) == ["hfgij>", "hidc>", "ejda>"]
    for make in (letters.prompts, letters.demonstrations):
        assert make(20, seed=3) == make(20, seed=3)
        assert make(20, seed=3) != make(20, seed=4)
        assert make(20, seed=3) != make(20, seed=3, split="heldout")


def test_writers_are_right_as_often_as_stated():
    rows = letters.demonstrations(4000, seed=0, writers=letters.Writers(careful=0.35, hurried=0.4))
    assert set(rows[0]) == {"prompt", "completion"}
    right = sum(letters.check(**row) for row in rows) / len(rows)
    assert right == pytest.approx(0.35, abs=0.03)  # four standard errors of a share over 4000 rows
    hurried = sum(row["completion"] == letters.answer(row["prompt"])[:-1] for row in rows) / len(rows)
    # A careless writer's one drop in four is the last letter's one time in five: 0.25 * 0.25 / 5 = 0.01 more at most.
    assert hurried == pytest.approx(0.405, abs=0.035)


def test_careless_writers_are_never_right_and_make_every_kind_of_slip():
    rows = letters.demonstrations(500, seed=0, writers=letters.Writers(careful=0.0, hurried=0.0, slip_again=0.0))
    assert not any(letters.check(**row) for row in rows)
    changes = {(len(row["completion"]) - len(letters.answer(row["prompt"])), letters.mistakes(**row)) for row in rows}
    # Dropped, doubled, replaced, and swapped, which is two edits.
    assert changes == {(-1, 1), (1, 1), (0, 1), (0, 2)}


def test_compare_prefers_the_best_answer_of_each_prompt():
    rows = letters.compare(
        ["cbad>", "fedc>"], [["abcd", "abc", "abc", "dcba", "ab", "abcdd"], ["cde", "cde"]], seed=0, pairs_per_prompt=3
    )
    assert len(rows) == 3
    assert {row["prompt"] for row in rows} == {"cbad>"}
    assert {row["chosen"] for row in rows} == {"abcd"}
    rejected = [row["rejected"] for row in rows]
    assert len(set(rejected)) == 3
    assert set(rejected) <= {"abc", "dcba", "ab", "abcdd"}
