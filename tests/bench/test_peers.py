"""The hand-written baselines answer with hf_generate's tokens and do the work they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
import torch
from peers import hf_generate, hf_shared_prefix, hf_sorted, transformers_generate_batch
from workloads import TINY_MODEL, Workload, build_model

LONG_TAIL = Workload(
    name="long_tail", model=TINY_MODEL, prompt_len=9, new_tokens=(3, 11, 2, 7, 4, 2)
)
ONE_PROMPT = Workload(name="one_prompt", model=TINY_MODEL, prompt_len=24, new_tokens=(6,), n=4)
TWO_PROMPTS = Workload(name="two_prompts", model=TINY_MODEL, prompt_len=9, new_tokens=(5, 3), n=3)


@pytest.fixture(scope="module")
def model():
    return build_model(TINY_MODEL, torch.float32, "cpu")


class TokensComputed:
    """Tokens that a model's decoder computes while this is open, padding included."""

    def __init__(self, model):
        self._backbone = model.base_model
        self.count = 0

    def __enter__(self):
        def add(_module, args, kwargs):
            given = args[0] if args else kwargs["input_ids"]
            self.count += given.numel()

        self._hook = self._backbone.register_forward_pre_hook(add, with_kwargs=True)
        return self

    def __exit__(self, *_error):
        self._hook.remove()


@pytest.mark.parametrize("workload", [LONG_TAIL, TWO_PROMPTS], ids=lambda workload: workload.name)
@pytest.mark.parametrize("batch_sizes", [(1,), (2, 4), (64,)])
def test_sorted_batches_give_hf_generates_tokens_in_input_order(model, workload, batch_sizes):
    expected = hf_generate(model, workload).run()
    assert [len(tokens) for tokens in expected] == workload.lengths()
    provider = hf_sorted(model, workload, batch_sizes=batch_sizes)
    assert provider.run() == expected
    assert provider.run() == expected


def test_sorted_batches_decode_no_row_past_the_longest_of_its_batch(model):
    provider = hf_sorted(model, LONG_TAIL, batch_sizes=(2,))
    provider.run()
    with TokensComputed(model) as computed:
        provider.run()
    # (2, 2), (3, 4), (7, 11): the first token comes with the prompt.
    assert computed.count == 6 * 9 + 2 * (1 + 3 + 10)


def test_the_first_call_tries_each_batch_size_and_the_fastest_stays(model, monkeypatch):
    sizes = []
    clock = SimpleNamespace(now=0.0)

    def generate(ids, **kwargs):
        sizes.append(len(ids))
        clock.now += 1.0 if len(ids) == 3 else 2.0
        return type(model).generate(model, ids, **kwargs)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    provider = hf_sorted(model, LONG_TAIL, batch_sizes=(2, 3, 5, 6))
    provider.run()
    # All six at once is hf_generate, and no sorted batches.
    assert sizes == [2, 2, 2] * 2 + [3, 3] + [5, 1] + [3, 3]
    assert provider.facts()["batch_size"] == "3"
    assert provider.facts()["batch_sizes_tried"] == "2: 6.000 s, 3: 2.000 s, 5: 4.000 s"
    sizes.clear()
    provider.run()
    assert sizes == [3, 3]


@pytest.mark.parametrize("workload", [ONE_PROMPT, TWO_PROMPTS], ids=lambda workload: workload.name)
def test_a_shared_prefix_gives_hf_generates_tokens_and_is_computed_once(model, workload):
    expected = hf_generate(model, workload).run()
    provider = hf_shared_prefix(model, workload)
    assert provider.run() == expected
    with TokensComputed(model) as computed:
        assert provider.run() == expected
    once = workload.num_prompts * (workload.prompt_len - 1)
    assert computed.count == once + workload.num_prompts * workload.n * workload.longest


@pytest.mark.parametrize("workload", [LONG_TAIL, ONE_PROMPT], ids=lambda workload: workload.name)
def test_transformers_own_batches_give_hf_generates_tokens(workload):
    # A model of its own: it is switched to paged attention.
    own = build_model(TINY_MODEL, torch.float32, "cpu")
    expected = hf_generate(own, workload).run()
    provider = transformers_generate_batch(own, workload)
    try:
        assert provider.run() == expected
    finally:
        provider.close()


# A process of its own: the ranks of these tests and those of the bench share a module name.
NAMES = """
import json, sys

sys.path.insert(0, sys.argv[1])
from bench_generate import contestants
from workloads import WORKLOADS

names = {}
for name in sys.argv[2:]:
    workload = WORKLOADS[name].shrunk()
    field = contestants(workload, "fp32", 0, device="cpu", zeros=(0,), chosen=("*",))
    names[name] = [each.name for each in field.contestants]
    field.close()
print(json.dumps(names))
"""


def test_each_workload_meets_the_baselines_by_hand_that_suit_it():
    suited = {
        "long_tail": {"hf_sorted"},
        "one_prompt_16x16": {"hf_shared_prefix"},
        "one_prompt_16x64": {"hf_shared_prefix"},
        "batch_1": set(),
    }
    bench = Path(peers.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", NAMES, str(bench), *suited],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name, names in json.loads(ended.stdout.splitlines()[-1]).items():
        assert names[0] == "hf_generate"
        assert {"hf_sorted", "hf_shared_prefix"} & set(names) == suited.pop(name)
        assert "transformers_generate_batch" in names
    assert not suited
