"""Texts that tasks want written: by whole models in memory, since each token needs all blocks."""

import contextlib
import io
from collections.abc import Sequence

import torch
from lm_eval.models.huggingface import HFLM

from grokquant import humanize
from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.evaluation.lm_tasks import LmTasks, Prompt
from grokquant.job.budget.memory import available_bytes
from grokquant.runtime.load import build_model

_DTYPE = torch.bfloat16


def check_fits(tasks: LmTasks, checkpoints: Sequence[Checkpoint], device: torch.device) -> None:
    """Raises InputError where one of the models is larger than what is free of memory."""
    names = ", ".join(sorted({str(r.task_name) for r in tasks.prompts.values()}))
    available = available_bytes(device)
    for checkpoint in checkpoints:
        needed = checkpoint.parameters * _DTYPE.itemsize
        if needed > available:
            raise InputError(
                f"tasks: {names}: generates text, for which the whole model has to be in memory: "
                f"{checkpoint.source.path} takes {humanize.size(needed)} as bf16, "
                f"{humanize.size(available)} are free; tasks that score text are streamed"
            )


def texts(tasks: LmTasks, checkpoint: Checkpoint, device: torch.device) -> dict[Prompt, str]:
    """What the model, in bfloat16, makes of all prompts, as lm-eval's own `HFLM` has it."""
    model = build_model(checkpoint, device, _DTYPE)
    with contextlib.redirect_stderr(io.StringIO()):
        whole = HFLM(
            pretrained=model, tokenizer=tasks.tokenizer, max_length=tasks.longest, batch_size=1
        )
        written = whole.generate_until(list(tasks.prompts.values()), disable_tqdm=True)
    return dict(zip(tasks.prompts, written, strict=True))
