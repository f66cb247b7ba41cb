"""
One rank of a distributed run on scripted rollouts, started by `tests/test_distributed.py` under torchrun.

    torchrun --nproc_per_node 2 tests/distributed_worker.py OUTPUT_FILE CASE
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

from tiny import scripted_reward, scripted_trainer

# Six groups of four completions in all, so with nine rows a rank the third group straddles the ranks.
CASES = {
    "straddling": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 2},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2},
    "dr_grpo": {"per_device_train_batch_size": 6, "loss_type": "dr_grpo", "max_steps": 1},
}


def infinite_on_one_rank(completions, score, trainer_state, **kwargs):
    rank = torch.distributed.get_rank()
    return [float("inf") if rank == 1 and i == 2 else 0.0 for i in range(len(completions))]


def main() -> None:
    output, case = Path(sys.argv[1]), sys.argv[2]
    with tempfile.TemporaryDirectory() as directory:
        if case == "infinite":
            trainer = scripted_trainer(directory, reward_funcs=[scripted_reward, infinite_on_one_rank])
            try:
                trainer.train()
                message = "trained"
            except ValueError as error:
                message = str(error)
            Path(f"{output}.{trainer.accelerator.process_index}").write_text(message)
            return
        trainer = scripted_trainer(directory, **CASES[case])
        trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), output)
        log = [entry for entry in trainer.state.log_history if "entropy" in entry]
        output.with_suffix(".json").write_text(json.dumps(log))


if __name__ == "__main__":
    main()
