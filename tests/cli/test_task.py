import random

import pytest

from tritonhybrid.demo.task import BOS, DIGIT_0, EOS, SEPARATOR, VOCAB_SIZE, SortingTask


def tokens(*digits: int) -> list[int]:
    return [DIGIT_0 + digit for digit in digits]


PROMPT = [BOS, *tokens(3, 1, 2), SEPARATOR]


def test_only_the_sorted_digits_with_their_end_are_rewarded():
    task = SortingTask()
    assert task.verify(PROMPT, [*tokens(1, 2, 3), EOS]) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        [*tokens(3, 2, 1), EOS],
        tokens(1, 2, 3),
        [*tokens(1, 2), EOS],
        [*tokens(1, 2, 3), EOS, EOS],
        [],
    ],
    ids=["descending", "no end", "too short", "too long", "empty"],
)
def test_any_other_completion_earns_nothing(completion: list[int]):
    assert SortingTask().verify(PROMPT, completion) == 0.0


def test_prompts_have_mixed_lengths_and_fit_the_vocabulary():
    task = SortingTask(min_digits=2, max_digits=5)
    prompts = task.prompts(200, random.Random(0))
    assert {len(prompt) - 2 for prompt in prompts} == {2, 3, 4, 5}
    assert all(prompt[0] == BOS and prompt[-1] == SEPARATOR for prompt in prompts)
    assert max(max(prompt) for prompt in prompts) == DIGIT_0 + 9 < VOCAB_SIZE
    assert max(len(task.answer(prompt)) for prompt in prompts) == task.max_new_tokens


def test_the_same_seed_draws_the_same_prompts():
    task = SortingTask()
    assert task.prompts(9, random.Random(4)) == task.prompts(9, random.Random(4))


def test_demonstrations_are_right_with_the_stated_share_and_descending_otherwise():
    task = SortingTask(correct_share=0.35)
    rng = random.Random(0)
    shown = [task.demonstration(PROMPT, rng) for _ in range(4000)]
    share = sum(answer == task.answer(PROMPT) for answer in shown) / len(shown)
    assert abs(share - 0.35) < 0.025
    assert {tuple(answer) for answer in shown} == {
        (*tokens(1, 2, 3), EOS),
        (*tokens(3, 2, 1), EOS),
    }


def test_tokens_are_rendered_for_people():
    assert SortingTask().render([*PROMPT, *tokens(1, 2, 3), EOS]) == "3 1 2 -> 1 2 3 ."
