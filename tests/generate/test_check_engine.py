"""``check_family`` of a wrapped engine: the weights under training, whatever the ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tritonhybrid
from tritonhybrid import ConfigError
from tritonhybrid.local_engine import LocalEngineConfig, build_engine
from tritonhybrid.testing import check_family


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrapped_engine_is_proved_like_a_model(model: Any, stage: int, dtype: str):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    config = LocalEngineConfig(zero_stage=stage, dtype=dtype)
    engine = build_engine(copy.to(getattr(torch, dtype)), config)
    tritonhybrid.wrap(engine, config={"block_size": 16})
    report = check_family(engine, max_new_tokens=8, path="fused")
    assert report.dtype == dtype
    assert report.num_tokens > 20
    if dtype == "float32":
        assert report.num_equal == report.num_tokens
        assert report.max_logprob_error <= 2e-4
    assert engine.stats.strategy == ("pinned" if stage == 3 else "resident")


def test_a_wrapped_engine_keeps_its_dtype_and_settings(engine: Any):
    with pytest.raises(ConfigError, match="has its dtype and its settings"):
        check_family(engine, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="has its dtype and its settings"):
        check_family(engine, config={"block_size": 32})
