"""transformers' Trainer over two processes that share each sequence: what it gives is what it gives on one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hf_cases import make_batch, make_model

from longctx.errors import ConfigError
from longctx.hf_trainer import sharded_trainer
from longctx.huggingface import gradient_checkpointing_kwargs, parallelize
from longctx.parallel.mesh import ParallelMesh
from longctx.parallel.plan import ParallelPlan
from longctx.testing import run_distributed

pytest.importorskip("accelerate")


def make_trainer(plan: ParallelPlan, folder: str, rows: Any, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments, default_data_collator

    compute_metrics = settings.pop("compute_metrics", None)
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=gradient_checkpointing_kwargs(),
        **settings,
    )
    mesh = ParallelMesh.create(plan, device="cpu")
    return sharded_trainer(Trainer, mesh)(
        parallelize(make_model("llama", "eager"), mesh),
        arguments,
        train_dataset=rows,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
    )


def samples() -> list[dict[str, torch.Tensor]]:
    """Ten sequences with different numbers of targets."""
    rows = [{"input_ids": tokens, "labels": tokens.clone()} for tokens in make_batch("plain", 10, 27)["input_ids"]]
    for i, row in enumerate(rows):
        row["labels"][: 2 * i] = -100
    return rows


def trained(rank: int, plan: ParallelPlan, folder: str) -> dict[str, Any]:
    """Two steps, each of two micro-batches of two sequences, and an evaluation."""
    # As torchrun says; accelerate asks for it where there are several processes.
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    trainer = make_trainer(plan, folder, samples())
    trainer.train()
    log = [entry[name] for entry in trainer.state.log_history for name in ("loss", "grad_norm") if name in entry]
    return {
        "log": [float(value) for value in log],
        "eval": trainer.evaluate(samples()[:3])["eval_loss"],
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
    }


@pytest.mark.slow
def test_over_two_processes_it_is_one(tmp_path):
    (one,) = run_distributed(trained, ParallelPlan(), str(tmp_path), world=1)
    two, _ = run_distributed(trained, ParallelPlan(ring=2), str(tmp_path), world=2)
    assert len(one["log"]) == 4
    assert two["log"] == pytest.approx(one["log"], rel=1e-5)
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-5)
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).norm() < 1e-6 * weight.norm(), name


@pytest.mark.filterwarnings("ignore")
def test_what_would_scale_the_loss_otherwise_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*average_tokens_across_devices.*compute_metrics"):
        make_trainer(
            ParallelPlan(), str(tmp_path), samples(), average_tokens_across_devices=False, compute_metrics=print
        )
    trainer = make_trainer(ParallelPlan(), str(tmp_path), iter(samples()))
    with pytest.raises(ConfigError, match="without a length"):
        trainer.get_train_dataloader()
