"""Two steps of TRL's GRPOTrainer on an attached engine; prints what they sampled as JSON.

A process of its own, one a rank: accelerate and transformers keep the DeepSpeed configuration of a
run in globals.

    python tests/integrations/grpo_run.py ZERO_STAGE DIRECTORY RANK WORLD_SIZE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import deepspeed
import pyarrow
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from datasets.table import InMemoryTable
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import tritonhybrid

WORDS = ["<pad>", "<eos>", *(f"w{index}" for index in range(62))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def build_trainer(stage: int, directory: str) -> GRPOTrainer:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's own AdamW would be compiled first.
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
    }
    arguments = GRPOConfig(
        output_dir=directory,
        deepspeed=config,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        temperature=0.7,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    prompts = [" ".join(WORDS[start : start + 1 + start % 4]) for start in range(2, 18)]
    # Named: datasets 5.2.0 pickles a table to name it, at which dill 0.4.1 fails on Python 3.11.7.
    table = InMemoryTable(pyarrow.table({"prompt": prompts}))
    return GRPOTrainer(
        model(),
        reward_funcs=lambda completions, **_: [float(text.count("1")) for text in completions],
        args=arguments,
        train_dataset=Dataset(table, fingerprint="prompts"),
        processing_class=tokenizer(),
    )


class Attach(TrainerCallback):
    """Attach where the engine exists, and write down what the rollout function returns."""

    def __init__(self, trainer: GRPOTrainer, rounds: list[dict]) -> None:
        self.trainer = trainer
        self.rounds = rounds

    def on_train_begin(self, *_args: object, **_kwargs: object) -> None:
        engine = tritonhybrid.trl.attach(self.trainer)
        rollout = self.trainer.rollout_func

        def recorded(prompts, trainer):
            answer = rollout(prompts, trainer)
            self.rounds.append(answer | {"trl": self.training_logprobs(answer)})
            self.rounds[-1] |= {"path": engine.stats.path, "strategy": engine.stats.strategy}
            return answer

        self.trainer.rollout_func = recorded

    @torch.no_grad()
    def training_logprobs(self, answer: dict) -> list[list[float]]:
        """TRL's own pass over the sampled tokens, a row at a time so that nothing is padded."""
        rows = []
        for prompt, completion in zip(answer["prompt_ids"], answer["completion_ids"], strict=True):
            ids = torch.tensor([prompt + completion])
            logprobs = self.trainer._get_per_token_logps_and_entropies(
                self.trainer.model, ids, torch.ones_like(ids), len(completion)
            )[0]
            rows.append(logprobs[0].tolist())
        return rows


def main() -> None:
    stage, directory = int(sys.argv[1]), sys.argv[2]
    rank, world_size = int(sys.argv[3]), int(sys.argv[4])
    if world_size > 1:
        # accelerate 1.15 knows no backend for several ranks of DeepSpeed on the CPU.
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        init_method=f"file://{Path(directory) / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
    )
    trainer = build_trainer(stage, directory)
    early = ""
    try:
        tritonhybrid.trl.attach(trainer)
    except tritonhybrid.EngineStateError as error:
        early = str(error)
    rounds: list[dict] = []
    trainer.add_callback(Attach(trainer, rounds))
    trainer.train()
    print(json.dumps({"early": early, "rounds": rounds}))


if __name__ == "__main__":
    os.environ.update(RANK=sys.argv[3], LOCAL_RANK=sys.argv[3], WORLD_SIZE=sys.argv[4])
    # accelerate asks for these; the ranks meet at a file.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    main()
