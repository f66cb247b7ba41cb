"""TRL's own GRPOTrainer with reliable runs: stopped in the middle as by a scheduler, and resumed by the same command.

    python examples/reliable_runs.py    # stops itself in step 12 with SIGTERM: saves it, and exits with status 75
    python examples/reliable_runs.py    # resumes from step 12, and ends with step 30: half a minute on a CPU, together

The second run prints `resumed from step 12, ended with step 30`. Its weights are bitwise those of a run without a stop.
"""

import os
import signal

from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from opo_trl.rewards import math_verify_reward
from opo_trl.runs.reliable_runs import ReliableRuns
from opo_trl.scripts.policies import model_path
from opo_trl.scripts.problems import load_problems


class MyTrainer(ReliableRuns, GRPOTrainer):
    """One line makes the runs of any subclass of GRPOTrainer reliable."""


class Scheduler(TrainerCallback):
    """Stands for a job scheduler that preempts the first start of the job in step 12."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        if self.first_step == 0 and state.global_step == 11:
            os.kill(os.getpid(), signal.SIGTERM)


config = GRPOConfig(
    output_dir="outputs/reliable_runs",
    max_steps=30,
    save_steps=10,
    learning_rate=1e-4,
    num_generations=8,
    per_device_train_batch_size=64,  # completions per step: 8 problems
    max_completion_length=32,
    logging_steps=5,
    report_to="none",
    use_cpu=True,  # on a GPU, remove this line and the next two
    bf16=False,
    gradient_checkpointing=False,
)
problems = load_problems("arithmetic", "train", num_arithmetic=1_000)
trainer = MyTrainer(model_path("tiny_policy"), math_verify_reward, config, train_dataset=problems)
scheduler = Scheduler()
trainer.add_callback(scheduler)
trainer.train(resume_from_checkpoint="auto")
print(f"resumed from step {scheduler.first_step}, ended with step {trainer.state.global_step}")
