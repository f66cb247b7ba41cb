"""
One of two ranks that train against a real vLLM server, started by tests/test_vllm_server.py.

    torchrun --standalone --nproc_per_node 2 tests/server_worker.py DIRECTORY URL GROUP CASE...

Each case continues the run in `DIRECTORY/run`, and leaves there what each rank ended with. `GROUP` is the process group
of the server, which the case "dies" kills in the middle of a generation.
"""

import json
import signal
import sys
import threading
from pathlib import Path

import torch

from vllm_servers import ServedPolicy, send_to_group, server_trainer

# Here two ranks cannot load AdamW's state again (torch knows no location "cpu:0"); in that of `make test` they can.
SGD = {"optim": "sgd", "learning_rate": 0.1}


def kill_in_generation(trainer, group, batch):
    """Have the server killed while it generates the given batch."""
    client, asked = trainer.vllm_generation.vllm_client, []
    request = client.session.request

    def send(method, url, **kwargs):
        asked.append(url.endswith("/v1/completions") and "max_tokens" in kwargs["json"] and kwargs["json"].get("n"))
        if asked[-1] and sum(map(bool, asked)) == batch:
            send_to_group(group, signal.SIGSTOP)  # it takes the request and does not answer
            threading.Timer(1.0, send_to_group, (group, signal.SIGKILL)).start()
        return request(method, url, **kwargs)

    client.session.request = send


def run(case, folder, url, group):
    reward = ServedPolicy()
    steps = {"trains": 2, "dies": 5, "resumes": 5}[case]
    trainer = server_trainer(
        folder, url, ranks=2, reward=reward, max_steps=steps, save_strategy="steps", save_steps=1, **SGD
    )
    reward.trainer = trainer
    if case == "dies" and trainer.accelerator.is_main_process:
        kill_in_generation(trainer, group, batch=2)
    message = "trained"
    try:
        trainer.train(resume_from_checkpoint="auto")
    except RuntimeError as error:
        message = str(error)
    if trainer.accelerator.is_main_process and case != "dies":
        reward.check(steps=2)
    ended = {"message": message, "step": trainer.state.global_step}
    (folder / f"{case}.{trainer.accelerator.process_index}.json").write_text(json.dumps(ended))


def main():
    torch.set_num_threads(1)
    folder, url, group = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    for case in sys.argv[4:]:
        run(case, folder, url, group)


if __name__ == "__main__":
    main()
