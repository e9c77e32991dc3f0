"""Text generation for tasks: by whole models in memory, as each token passes all blocks."""

import contextlib
import io
from collections.abc import Sequence

import torch
from lm_eval.models.huggingface import HFLM

from grokquant import humanize
from grokquant.checkpoint import Checkpoint
from grokquant.errors import InputError
from grokquant.evaluation.lm_tasks import LmTasks
from grokquant.job.budget.memory import available_bytes
from grokquant.runtime.load import build_model

_DTYPE = torch.bfloat16  # of generating models


def check_fits(tasks: LmTasks, checkpoints: Sequence[Checkpoint], device: torch.device) -> None:
    """Raises InputError where one of the models does not fit in the free memory."""
    names = ", ".join(sorted({str(r.task_name) for r in tasks.prompts.values()}))
    available = available_bytes(device)
    for checkpoint in checkpoints:
        needed = checkpoint.parameters * _DTYPE.itemsize
        if needed > available:
            raise InputError(
                f"tasks: {names}: generates text, which needs the whole model in memory: "
                f"{checkpoint.source.path} takes {humanize.size(needed)} as bf16, "
                f"{humanize.size(available)} are free; tasks that only score text are streamed"
            )


def texts(tasks: LmTasks, checkpoint: Checkpoint, device: torch.device) -> list[str]:
    """The texts that the model, in bfloat16, generates for all prompts, by lm-eval's own `HFLM`."""
    model = build_model(checkpoint, device, _DTYPE)
    with contextlib.redirect_stderr(io.StringIO()):
        whole = HFLM(
            pretrained=model, tokenizer=tasks.tokenizer, max_length=tasks.longest, batch_size=1
        )
        return whole.generate_until(list(tasks.prompts.values()), disable_tqdm=True)
