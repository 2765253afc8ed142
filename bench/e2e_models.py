"""The models of the end-to-end bench: one set of weights under each contestant."""

from __future__ import annotations

import copy
from typing import Any

import peers
import torch
from comparison import OURS
from engines import deepspeed_engine
from ours import rollout_of
from provider import Provider
from workloads import ModelShape, Workload, build_model


class Models:
    """The same weights three times: HF's, under our engine, under DeepSpeed's rollout."""

    def __init__(
        self, shape: ModelShape, dtype: torch.dtype, device: str, torch_ops: tuple[str, ...]
    ) -> None:
        self.device = device
        self._torch_ops = torch_ops
        self._dtype = dtype
        self._plain = build_model(shape, dtype, device)
        self._made: dict[str, Any] = {}

    def _engine(self, owner: str) -> Any:
        """Return the engine of `owner`, made at first use; a failure to make it is remembered."""
        if owner not in self._made:
            try:
                self._made[owner] = self._make(owner)
            except Exception as error:
                self._made[owner] = error
        made = self._made[owner]
        if isinstance(made, Exception):
            raise made
        return made

    def _make(self, owner: str) -> Any:
        # Without an optimizer: its states would take six times the weights.
        engine = deepspeed_engine(copy.deepcopy(self._plain), 0, self._dtype, trains=False)
        if owner != OURS:
            return engine
        import tritonhybrid

        # On the CPU, where only a dry run comes, "auto" is the torch path.
        config = {"backend": "auto", "torch_ops": self._torch_ops}
        engine = tritonhybrid.wrap(engine, config=config)
        engine.eval()
        return engine

    def provider(self, name: str, workload: Workload) -> Provider:
        if name == OURS:
            return rollout_of(self._engine(OURS), workload)
        if name == "hf_generate":
            return peers.hf_generate(self._plain, workload, device=self.device)
        if name == "hf_static_compile":
            return peers.hf_static_compile(self._plain, workload, device=self.device)
        graph = name == "deepspeed_rollout_graph"
        engine = self._engine("deepspeed")
        return peers.deepspeed_rollout(engine, workload, device=self.device, graph=graph)
