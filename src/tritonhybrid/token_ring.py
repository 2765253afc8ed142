"""Where the steps of a replay leave their tokens until the host looks."""

from __future__ import annotations

import torch


class TokenRing:
    """Sampled tokens of several steps and their log-probabilities, read by the host at once.

    Args:
        max_steps: Most steps (R).
        max_num_seqs: Most rows (B).
        device: Where they are sampled.
    """

    def __init__(self, max_steps: int, max_num_seqs: int, device: torch.device) -> None:
        self.max_steps = max_steps
        self._shape = (max_steps, max_num_seqs)
        self._device = device
        # One memory, so that one copy brings all of it.
        size = max_steps * max_num_seqs * (8 + 4 + 4)
        self._memory = torch.zeros(size, dtype=torch.uint8, device=device)
        self.tokens, self.logprobs, self.raw_logprobs = self._columns(self._memory)
        self._host = self._memory
        if device.type == "cuda":
            self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of its memory, and its form."""
        return self._memory.data_ptr(), *self._shape

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[R, B] tokens and log-probabilities on the host, when the device has come so far."""
        if self._device.type == "cuda":
            self._host.copy_(self._memory, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            arrived.synchronize()
        return self._columns(self._host)

    def _columns(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = self._shape[0] * self._shape[1]
        tokens, logprobs, raw_logprobs = memory.split((8 * count, 4 * count, 4 * count))
        return (
            tokens.view(torch.int64).view(self._shape),
            logprobs.view(torch.float32).view(self._shape),
            raw_logprobs.view(torch.float32).view(self._shape),
        )
