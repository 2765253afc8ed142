"""Group-relative policy optimisation: advantages, the clipped loss, and what drifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Prompts with their completions, padded on the right (causal models never look there).

    Args:
        input_ids: [B, L] int64.
        completion_mask: [B, L - 1] bool; True where the *next* token was sampled.
        old_logprobs: [B, L - 1] fp32; log-probability of the next token when it was sampled,
            0 outside the mask.
        advantages: [B] fp32.
    """

    input_ids: torch.Tensor
    completion_mask: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor

    def rows(self, start: int, stop: int) -> TokenBatch:
        """Return the rows from ``start`` up to ``stop`` as views."""
        return TokenBatch(
            input_ids=self.input_ids[start:stop],
            completion_mask=self.completion_mask[start:stop],
            old_logprobs=self.old_logprobs[start:stop],
            advantages=self.advantages[start:stop],
        )


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    advantages: Sequence[float],
    *,
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> TokenBatch:
    """Lay out one row per completion.

    Args:
        prompts: Token ids of each row's prompt.
        completions: Token ids that were sampled after it.
        logprobs: One per sampled token; empty rows where none are known (then 0).
        advantages: One per row.
        pad_token_id: Fills the right end.
        device: Where the tensors go.

    Returns:
        The batch; L is the longest row.
    """
    num_rows = len(prompts)
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_ids = torch.full((num_rows, width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((num_rows, width - 1), dtype=torch.bool)
    old_logprobs = torch.zeros((num_rows, width - 1), dtype=torch.float32)
    rows = zip(prompts, completions, logprobs, strict=True)
    for row, (prompt, completion, sampled) in enumerate(rows):
        begin, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, begin - 1 : end - 1] = True
        if sampled:
            old_logprobs[row, begin - 1 : end - 1] = torch.tensor(sampled)
    return TokenBatch(
        input_ids=input_ids.to(device),
        completion_mask=mask.to(device),
        old_logprobs=old_logprobs.to(device),
        advantages=torch.tensor(advantages, dtype=torch.float32, device=device),
    )


def group_advantages(rewards: Sequence[float], group_size: int) -> list[float]:
    """Standardise each reward within its prompt's group.

    Formula: ``(r - mean(group)) / (std(group) + 1e-4)``, population std.
    Source: DeepSeekMath, arXiv:2402.03300, section 4.1.

    Args:
        rewards: One per completion, the completions of a prompt adjacent.
        group_size: Completions a prompt.

    Returns:
        One per completion; all 0 in a group whose rewards are equal.
    """
    groups = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    scale = centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-4
    advantages: list[float] = (centred / scale).flatten().tolist()
    return advantages


def next_token_logprobs(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Read off the log-probability of each next token.

    Args:
        logits: [B, L, V] of any float dtype.
        input_ids: [B, L] int64.

    Returns:
        [B, L - 1] fp32.
    """
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return logprobs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def clipped_loss(
    logprobs: torch.Tensor,
    batch: TokenBatch,
    *,
    max_new_tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> torch.Tensor:
    """Policy-gradient loss with the probability ratio clipped, as in PPO and GRPO.

    Formula: ``-sum(min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)) / (B * max_new_tokens)``.
    The divisor is a constant (Dr. GRPO, arXiv:2503.20783), so no answer is favoured for its
    length and the mean over ranks is the loss of the whole batch. The wider upper clip is
    DAPO's (arXiv:2503.14476).

    Args:
        logprobs: [B, L - 1] under the weights being trained, with gradient.
        batch: The sampled tokens.
        max_new_tokens: Most tokens a completion could have.
        clip_low: Most that a ratio counts below 1.
        clip_high: Most that a ratio counts above 1.

    Returns:
        Scalar loss.
    """
    ratio = torch.exp(logprobs - batch.old_logprobs)
    advantages = batch.advantages[:, None]
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    return -(gain * batch.completion_mask).sum() / (len(gain) * max_new_tokens)


def imitation_loss(logprobs: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Mean cross-entropy of the completions' tokens; warm-up trains on it.

    Args:
        logprobs: [B, L - 1] under the weights being trained, with gradient.
        batch: The tokens to imitate.

    Returns:
        Scalar loss.
    """
    mask = batch.completion_mask
    return -(logprobs * mask).sum() / mask.sum()


@dataclass(kw_only=True)
class Drift:
    """How far rollout log-probabilities lie from the training forward's on the same weights.

    Args:
        num_tokens: Tokens compared.
        sum_abs: Sum of |training - rollout|.
        max_abs: Largest |training - rollout|.
        sum_k3: Sum of ``exp(d) - 1 - d`` with d = training - rollout: an estimate of
            KL(rollout || training) that is never negative
            (http://joschu.net/blog/kl-approx.html).
    """

    num_tokens: int = 0
    sum_abs: float = 0.0
    max_abs: float = 0.0
    sum_k3: float = 0.0

    @property
    def mean_abs(self) -> float:
        """Mean of |training - rollout| over the tokens."""
        return self.sum_abs / self.num_tokens if self.num_tokens else 0.0

    @property
    def mean_k3(self) -> float:
        """Mean of the k3 estimate over the tokens."""
        return self.sum_k3 / self.num_tokens if self.num_tokens else 0.0

    def add(self, logprobs: torch.Tensor, batch: TokenBatch) -> None:
        """Compare one batch; call it before the first step on a rollout.

        Args:
            logprobs: [B, L - 1] of the training forward.
            batch: Its ``old_logprobs`` are the rollout's, unfiltered and at temperature 1.
        """
        delta = (logprobs.detach() - batch.old_logprobs)[batch.completion_mask].double()
        self.num_tokens += delta.numel()
        self.sum_abs += delta.abs().sum().item()
        self.max_abs = max(self.max_abs, delta.abs().max().item())
        self.sum_k3 += (torch.expm1(delta) - delta).sum().item()
