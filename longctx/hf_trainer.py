"""transformers' Trainer on sequences that are cut over the ranks of a mesh."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from longctx.errors import ConfigError, Problem, format_problems
from longctx.huggingface import shard_batch
from longctx.parallel.mesh import ParallelMesh


def sharded_trainer(trainer: type, mesh: ParallelMesh, **options: Any) -> type:
    """A subclass of transformers' Trainer, or of one built on it, whose every batch is cut over `mesh`.

    The ranks of `mesh.sp` read the same samples, those of `mesh.dp` different ones, so `per_device_train_batch_size` counts
    whole sequences of a data-parallel rank. The Trainer's own arithmetic, which divides by the targets of all ranks, then
    gives the loss and gradients of one process, under DDP and FSDP alike. Evaluation gives the loss; logits are of shards.

    Args:
        trainer: the class.
        mesh: that of `parallelize`; made after `TrainingArguments`, which start the process group.
        options: `mask` and `layout` of `shard_batch`.

    Raises:
        ConfigError: when it is made, if its arguments or model would scale the loss otherwise.
    """

    class ShardedTrainer(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            problems = []
            if not self.args.average_tokens_across_devices:
                problems.append(
                    Problem(
                        "average_tokens_across_devices = False: a shard's loss would be divided by its own targets",
                        "leave it True, its default",
                    )
                )
            if not self.model_accepts_loss_kwargs:
                problems.append(
                    Problem(
                        f"{type(self.model).__name__} takes no num_items_in_batch, so its loss is the mean of a shard",
                        "use a causal language model of transformers, or give it **kwargs that reach its loss",
                    )
                )
            if self.compute_metrics is not None:
                problems.append(
                    Problem(
                        "compute_metrics is given, but logits are of shards", "leave it out; evaluation gives the loss"
                    )
                )
            if problems:
                raise ConfigError(format_problems("this sharded Trainer", problems))
            self.args.prediction_loss_only = True

        def get_train_dataloader(self) -> DataLoader:
            return self._sharded_loader(self.train_dataset, self.args.train_batch_size, is_training=True)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
            if isinstance(eval_dataset, str):
                eval_dataset = self.eval_dataset[eval_dataset]
            chosen = self.eval_dataset if eval_dataset is None else eval_dataset
            return self._sharded_loader(chosen, self.args.eval_batch_size, is_training=False)

        def _sharded_loader(self, dataset: Any, batch_size: int, *, is_training: bool) -> DataLoader:
            if not hasattr(dataset, "__len__"):
                raise ConfigError(
                    f"the dataset is a {type(dataset).__name__} without a length, so ranks cannot agree who reads what\n"
                    "       give a dataset with __len__ and __getitem__"
                )
            # The Trainer tells this sampler the epoch.
            sampler: DistributedSampler[Any] = DistributedSampler(
                dataset,
                num_replicas=mesh.dp.size,
                rank=mesh.dp.rank,
                shuffle=is_training,
                seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
                drop_last=is_training,
            )
            return DataLoader(
                dataset,
                batch_size,
                sampler=sampler,
                drop_last=is_training,
                # Without workers: shards are made on the mesh's device.
                # The number is the Trainer's to say, which counts the targets of a whole step; given one, nothing is counted here.
                collate_fn=lambda rows: shard_batch(self.data_collator(rows), mesh, num_items_in_batch=1, **options),
            )

    ShardedTrainer.__name__ = f"Sharded{trainer.__name__}"
    return ShardedTrainer
