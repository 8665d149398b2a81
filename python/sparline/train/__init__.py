# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: ``sparline train config.yaml [key=value ...]``, and the same as a library:

summary = train.run(train.load_config("sla2.yaml", ["method.keep_ratio=0.03"]))

docs/training.md is the guide.
"""

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
    finally:
        trainer.close()
