"""Training after an evaluation."""

from typing import Any

from torch.nn.parallel import DistributedDataParallel


def prepare_anew(trainer: Any) -> None:
    """
    Undo what an evaluation before training has prepared.

    accelerate 1.15 takes a model that it prepared for evaluation for one that is ready to train. Under plain data
    parallelism no gradient would then be averaged: each rank would silently train a policy of its own. No issue is
    known; delete this when accelerate wraps such a model for training.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that begins to train; its model and its accelerator are reset if it needs that.

    Raises:
        ValueError: Under DeepSpeed, whose engine has no optimizer then and cannot be made anew.
    """
    if trainer.is_deepspeed_enabled and trainer.deepspeed is not None and trainer.optimizer is None:
        raise ValueError(
            "Under DeepSpeed a trainer that has evaluated before training cannot train any more: its engine has no "
            "optimizer. Set eval_on_start=True instead of calling evaluate() first."
        )
    if trainer.accelerator.num_processes == 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    if any(isinstance(module, DistributedDataParallel) for module in trainer.model_wrapped.modules()):
        return  # prepared by an earlier call of train()
    trainer.accelerator.free_memory()
    # With mixed precision accelerate would take away what TRL has put around the forward as well as its own.
    forward = trainer.model.__dict__.pop("_original_forward", None)
    trainer.model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if forward is not None:
        trainer.model.forward = forward
    trainer.model._is_accelerate_prepared = False
    trainer.model_wrapped = trainer.model
