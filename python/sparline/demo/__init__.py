# SPDX-License-Identifier: Apache-2.0
"""A small video model of our own, to try attention methods on: 9 M parameters, 8 192 tokens.

from sparline import demo
clip = demo.load_pipeline()("chelsea", num_inference_steps=12).frames[0]  # (8, 64, 64, 3) in [0, 1]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .pipeline import DemoPipeline

__all__ = ["HELD_OUT_CLASS", "HELD_OUT_VIDEO", "TUNED", "WEIGHTS", "load_pipeline"]

#: The bundled weights, in diffusers' layout; MODEL_CARD.md beside them says how they were made.
WEIGHTS = Path(__file__).parent / "weights"

#: The bundled model fine-tuned with SLA2 at 95 and 97 % sparsity, as ``sparline train`` leaves it.
TUNED = {name: WEIGHTS / name for name in ("sla2-95", "sla2-97")}

#: 20 frames of 64 x 64 from the part of Big Buck Bunny that training never saw, and its class.
#: (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0; cropped and scaled.
HELD_OUT_VIDEO = Path(__file__).parent / "assets" / "held_out.mp4"
HELD_OUT_CLASS = "bigbuckbunny"


def load_pipeline(torch_dtype: torch.dtype = torch.float32) -> DemoPipeline:
    """The bundled model, on the CPU. Needs diffusers; nothing is downloaded."""
    if not (WEIGHTS / "model_index.json").is_file():
        raise FileNotFoundError(
            f"sparline.demo: the bundled weights must lie in {WEIGHTS}, and are not there. "
            "Reinstall sparline, or train them with examples/train_demo_model.py --export."
        )
    from .pipeline import DemoPipeline

    pipeline: DemoPipeline = DemoPipeline.from_pretrained(
        WEIGHTS, dtype=torch_dtype, local_files_only=True, use_safetensors=True
    )
    return pipeline
