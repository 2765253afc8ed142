"""What ``import tritonhybrid`` loads, and what it leaves for those who need it."""

import json
import subprocess
import sys

import pytest

PUBLIC_NAMES = (
    "Completion",
    "HybridConfig",
    "HybridEngine",
    "RolloutOutput",
    "SamplingParams",
    "TritonHybridError",
    "TritonRollout",
    "register_policy",
    "testing",
    "trl",
    "unwrap",
    "wrap",
)


def modules_added_by(code: str) -> set[str]:
    """Return the modules that `code` loads on top of torch, transformers and deepspeed."""
    script = f"""
import json, sys
import deepspeed, torch, transformers
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def added_by_the_public_names() -> set[str]:
    return modules_added_by(
        "\n".join(["import tritonhybrid", *(f"tritonhybrid.{name}" for name in PUBLIC_NAMES)])
    )


def test_importing_everything_public_loads_no_modelling_code(added_by_the_public_names: set[str]):
    modelling = {
        name
        for name in added_by_the_public_names
        if name.startswith("transformers.models.") and ".modeling_" in name
    }
    assert "tritonhybrid.engine" in added_by_the_public_names
    assert modelling == set()


def test_a_rollout_without_progress_loads_no_drawing():
    added = modules_added_by("""
from transformers import LlamaConfig, LlamaForCausalLM
from tritonhybrid import SamplingParams
from tritonhybrid.testing import hold

sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
hold(model).rollout([[3, 4]], SamplingParams(max_new_tokens=2))
""")
    assert "tritonhybrid.decoding_loop" in added
    assert {name.split(".")[0] for name in added}.isdisjoint({"matplotlib", "rich"})
    assert "tritonhybrid.progress_bar" not in added


def test_importing_everything_public_loads_no_drawing(added_by_the_public_names: set[str]):
    tops = {name.split(".")[0] for name in added_by_the_public_names}
    assert tops.isdisjoint({"matplotlib", "rich"})


def test_importing_everything_public_loads_no_trl(added_by_the_public_names: set[str]):
    tops = {name.split(".")[0] for name in added_by_the_public_names}
    assert "tritonhybrid.trl" in added_by_the_public_names
    assert tops.isdisjoint({"datasets", "trl"})


def test_an_unknown_name_is_an_attribute_error():
    import tritonhybrid

    with pytest.raises(AttributeError, match="no_such_name"):
        tritonhybrid.no_such_name  # noqa: B018


def test_every_public_name_is_listed():
    import tritonhybrid

    assert set(PUBLIC_NAMES) <= set(tritonhybrid.__all__)
    assert set(tritonhybrid.__all__) <= set(dir(tritonhybrid))
