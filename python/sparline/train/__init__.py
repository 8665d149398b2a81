# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: ``sparline train config.yaml [key=value ...]``, and the same as a library:

summary = train.run(train.load_config("sla2.yaml", ["method.keep_ratio=0.03"]))

docs/training.md is the guide.
"""

import torch

from .config import Config, TrainError, from_dict, load_config
from .loop import Progress, Summary, Trainer, be_silent
from .router import RouterSummary, RouterTrainer

__all__ = [
    "Config",
    "RouterSummary",
    "RouterTrainer",
    "Summary",
    "TrainError",
    "Trainer",
    "from_dict",
    "load_config",
    "run",
]


def run(
    config: Config, on_progress: Progress = be_silent, *, device: str | None = None
) -> Summary | RouterSummary:
    """Does what ``config`` says, from its last checkpoint on. Under torchrun every process calls
    this. Raises TrainError, in one sentence, for what the caller can mend."""
    trainer: Trainer | RouterTrainer
    if config.task == "router":
        trainer = RouterTrainer(config, device=device)
    else:
        trainer = Trainer(config, device=device)
    try:
        return trainer.run(on_progress)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise TrainError(
            f"train: the device's memory must hold a step, and it does not: {reason} Set "
            "model.gradient_checkpointing=true, lower data.train_batch_size (and raise "
            "training.gradient_accumulation_steps), or use more GPUs, with "
            "distributed.ulysses_degree where one clip is too much."
        ) from error
    finally:
        trainer.close()
