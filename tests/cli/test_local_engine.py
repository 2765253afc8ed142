import pytest
import torch

from tritonhybrid.errors import ConfigError
from tritonhybrid.local_engine import LocalEngineConfig, choose_device


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"zero_stage": 4}, "ZeRO stage"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float16", "device": "cpu"}, "float16 on an accelerator only"),
    ],
)
def test_what_deepspeed_would_not_take_is_refused(settings: dict, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        LocalEngineConfig(**settings)


def test_the_optimizer_is_one_that_needs_no_compiler():
    config = LocalEngineConfig(zero_stage=2, lr=0.5).deepspeed_config()
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert config["optimizer"]["params"]["lr"] == 0.5
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("dtype", "block"), [("float32", None), ("bfloat16", "bf16"), ("float16", "fp16")]
)
def test_each_dtype_switches_on_its_own_block(dtype: str, block: str | None):
    config = LocalEngineConfig(dtype=dtype, device="cuda").deepspeed_config()
    assert {name for name in ("bf16", "fp16") if name in config} == ({block} if block else set())


@pytest.mark.parametrize(
    ("num_devices", "num_ranks", "wish", "device"),
    [(0, 1, "auto", "cpu"), (1, 1, "auto", "cuda"), (1, 2, "auto", "cpu"), (2, 2, "cpu", "cpu")],
)
def test_auto_takes_cuda_where_each_rank_has_a_device(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, num_ranks: int, wish: str, device: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    assert choose_device(wish, num_ranks=num_ranks) == device


def test_cuda_that_is_not_there_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        choose_device("cuda")
