"""Pushing to the Hub: the real client against a stand-in of its HTTP interface, that also says no."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from trl import GRPOTrainer

from hub_stand_in import Fault, HubStandIn, Repository
from opo_trl.runs.checkpoints import MARKER, incomplete_reason, latest_complete
from opo_trl.runs.hub import BackgroundPushes, PushError, describe_error
from tiny import scripted_trainer

TESTS = Path(__file__).parent
CASES = (
    "every_save", "checkpoint", "every_checkpoint", "end", "slow", "quota", "interrupted_and_resumed", "preempted",
    "refused", "not_asked", "plain",
)  # fmt: skip
QUOTA = (
    Fault("POST /api/models/alice/quota/commit", 403, "Private repository storage limit reached", times=1),
    Fault("POST /api/models/alice/quota/commit", 503, "Service unavailable", first=2, times=1),
)


def environment(hub, home, **variables):
    """Of a process that knows no other Hub than the stand-in."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **inherited,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def train_math_arguments(model, problems, output_dir, *more):
    return [
        "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_completion_length", "4", "--num_generations", "2",
        "--per_device_train_batch_size", "4", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-3",
        "--model_name_or_path", str(model), "--dataset_name", str(problems), "--output_dir", str(output_dir),
        "--push_to_hub", "--hub_model_id", "alice/math", "--hub_strategy", "checkpoint", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}+{n}?", "answer": str(2 * n)}) + "\n" for n in range(12)))
    return path


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, chat_model_dir, problems):
    """Every case of `hub_run.py`, in one process: the Hub afterwards, the folder of the runs, and what came out."""
    output_dir = tmp_path_factory.mktemp("pushed")
    hub = HubStandIn()
    hub.repositories |= {"alice/there": Repository(), "bob/public": Repository()}
    hub.faults = [
        Fault("POST /api/models/alice/every-save/preupload", 503, "Try again", times=1),
        *map(replace, QUOTA),
        Fault("POST /api/models/alice/every-checkpoint/preupload", None, delay=1.0, times=1),
        Fault("POST /api/models/alice/slow/preupload", None, delay=1.0, times=1),
        Fault("GET /api/models/alice/down/auth-check", 500, "Internal Server Error"),
        Fault("POST /api/models/alice/math/commit", 403, "Quota exceeded", first=2),
    ]
    arguments = train_math_arguments(chat_model_dir, problems, output_dir / "math")
    command = [sys.executable, str(TESTS / "hub_run.py"), str(output_dir), *CASES, "--", *arguments]
    variables = environment(hub, output_dir / "home", HF_TOKEN="hf_writer")
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    results = output_dir / "results.0.json"
    assert results.exists(), run.stderr[-3000:]
    yield hub, output_dir, json.loads(results.read_text()) | {"train_math": run}
    hub.close()


def local_files(folder, leave_out=()):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(("checkpoint-", ".", *leave_out))
    }


def below(files, folder):
    return {
        path.removeprefix(f"{folder}/"): content for path, content in files.items() if path.startswith(f"{folder}/")
    }


@pytest.mark.slow
def test_every_save_leaves_the_folder_on_the_hub(pushed):
    hub, output_dir, results = pushed
    assert results["every_save"]["result"] == {"step": 8, "failures": []}, "a short outage is none"
    repository = hub.repositories["alice/every-save"]
    assert repository.private
    assert [commit.summary for commit in repository.commits[1:]] == [
        "Training in progress, step 4",
        "Training in progress, step 8",
    ]
    assert repository.files == local_files(output_dir / "every_save")
    assert (
        repository.files["model.safetensors"]
        == (output_dir / "every_save" / "checkpoint-8" / "model.safetensors").read_bytes()
    )


@pytest.mark.slow
def test_a_plain_grpo_trainer_with_reliable_runs_pushes(pushed):
    hub, output_dir, results = pushed
    assert results["plain"]["result"] == {"step": 8, "failures": []}
    repository = hub.repositories["alice/plain"]
    assert [commit.summary for commit in repository.commits[1:]] == [
        "Training in progress, step 4",
        "Training in progress, step 8",
    ]
    assert repository.files == local_files(output_dir / "plain")
    assert not any(b"hf_writer" in content for content in repository.files.values())


@pytest.mark.slow
def test_the_last_checkpoint_on_the_hub_is_whole(pushed, tmp_path):
    hub, output_dir, results = pushed
    assert results["checkpoint"]["result"] == {"step": 8, "failures": []}
    repository = hub.repositories["alice/checkpoint"]
    assert not repository.private
    for commit, step in ((repository.commits[2], 4), (repository.commits[4], 8)):
        assert below(commit.files, "last-checkpoint") == local_files(output_dir / "checkpoint" / f"checkpoint-{step}")
        assert MARKER in below(commit.files, "last-checkpoint")
    assert len(repository.commits) == 5


@pytest.mark.slow
def test_every_checkpoint_arrives_even_with_room_for_one(pushed):
    hub, output_dir, results = pushed
    assert results["every_checkpoint"]["result"] == {"step": 8, "failures": []}
    files = hub.repositories["alice/every-checkpoint"].files
    for step in (2, 4, 6, 8):
        marked = json.loads(files[f"checkpoint-{step}/{MARKER}"])["files"]
        arrived = {name: len(content) for name, content in below(files, f"checkpoint-{step}").items()}
        del arrived[MARKER]
        assert arrived == marked
    assert [path.name for path in (output_dir / "every_checkpoint").glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.slow
def test_the_strategy_end_sends_nothing_before_it_is_asked(pushed):
    hub, output_dir, results = pushed
    repository = hub.repositories["alice/end"]
    assert [commit.summary for commit in repository.commits[1:]] == ["That was it"]
    assert repository.files == local_files(output_dir / "end")
    assert results["end"]["result"]["url"].endswith(repository.commits[-1].oid)


@pytest.mark.slow
def test_no_checkpoint_is_deleted_on_its_way_and_the_last_one_arrives(pushed):
    """With transformers, the checkpoint is gone before its turn comes, and no later save is sent."""
    hub, output_dir, results = pushed
    assert results["slow"]["result"] == {"step": 8, "failures": []}
    assert [path.name for path in (output_dir / "slow").glob("checkpoint-*")] == ["checkpoint-8"]
    repository = hub.repositories["alice/slow"]
    assert below(repository.files, "last-checkpoint") == local_files(output_dir / "slow" / "checkpoint-8")
    assert "| steps | 8 of 8 |" in repository.files["README.md"].decode()
    assert len(repository.commits) < 1 + 2 * 8, "nothing was skipped: this proves nothing"


@pytest.mark.slow
def test_a_push_that_fails_is_warned_about_and_repeated_and_costs_no_file(pushed):
    hub, output_dir, results = pushed
    result, log = results["quota"]["result"], results["quota"]["log"]
    assert result["step"] == 8
    assert result["final"] == "checkpoint-8"
    warnings = [(step, message) for level, step, message in log if level == "WARNING"]
    assert [step for step, _ in warnings] == [4, 4], "at the next save"
    assert "model of step 2: " in warnings[0][1]
    assert "Private repository storage limit reached" in warnings[0][1]
    assert "checkpoint of step 2: " in warnings[1][1]
    assert "503" in warnings[1][1]
    (error,) = [message for level, _, message in log if level == "ERROR"]
    assert "storage limit reached" in error
    assert len(result["failures"]) == 2
    assert [name for name, _ in result["raised"]] == ["PushError"] * 3
    assert all("storage limit reached" in message and "503" in message for _, message in result["raised"])
    # All the same, everything that came later arrived, the attempt of the call that raised among it.
    repository = hub.repositories["alice/quota"]
    assert "End of training" in [commit.summary for commit in repository.commits]
    assert repository.files["model.safetensors"] == (output_dir / "quota" / "model.safetensors").read_bytes()
    assert below(repository.files, "last-checkpoint") == local_files(output_dir / "quota" / "checkpoint-8")
    for step in (2, 4, 6, 8):
        assert incomplete_reason(output_dir / "quota" / f"checkpoint-{step}") is None


@pytest.mark.slow
def test_a_run_goes_on_from_the_hub_to_the_same_bits(pushed):
    hub, _, results = pushed
    assert results["interrupted_and_resumed"]["result"] == {
        "step": 8,
        "failures": [],
        "missing": None,
        "resumed at": 4,
        "same bits": True,
    }
    state = hub.repositories["alice/resumed"].files["last-checkpoint/trainer_state.json"]
    assert json.loads(state)["global_step"] == 8


@pytest.mark.slow
def test_who_is_asked_to_stop_saves_and_does_not_push(pushed):
    """Nor does it wait for an upload that is under way."""
    hub, _, results = pushed
    assert results["preempted"]["result"] == {"code": 75, "whole": "checkpoint-5"}
    state = hub.repositories["alice/preempted"].files["last-checkpoint/trainer_state.json"]
    assert json.loads(state)["global_step"] == 4


REFUSALS = [
    ("no such token", "alice/new", "401"),
    ("read-only token", "alice/new", "You don't have the rights to create a model"),
    ("read-only token, own repository", "alice/there", "You don't have the required permissions"),
    ("foreign namespace", "bob/new", "the namespace 'bob'"),
    ("foreign repository", "bob/public", "You don't have the required permissions"),
    ("public where private is wanted", "alice/there", "hub_private_repo=True, but it exists and is public"),
    ("down", "alice/down", "500"),
    ("no name", "not a name", "HFValidationError"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name", "answer"), REFUSALS)
def test_a_hub_that_says_no_is_an_error_before_the_model_is_looked_for(pushed, case, name, answer):
    message = pushed[2]["refused"]["result"][case]
    assert message.startswith(f"ValueError: push_to_hub=True needs a repository that may be written to, got {name!r}: ")
    assert answer in message
    assert "hf auth login" in message
    assert "HF_TOKEN" in message
    assert "hub_model_id" in message
    assert "hf_" not in message.replace("HF_TOKEN", ""), "a token has no business in a message"


@pytest.mark.slow
def test_a_run_that_does_not_push_asks_nothing(pushed):
    """It gets as far as the model that is not there."""
    hub, _, results = pushed
    assert "no-such-model" in results["not_asked"]["result"]["error"]
    assert not any("not_asked" in request or "no-such-model" in request for request in hub.requests)


@pytest.mark.slow
def test_no_token_is_pushed(pushed):
    hub, output_dir, _ = pushed
    assert b"hf_writer" not in b"".join(hub.blobs.values())
    for repository in hub.repositories.values():
        assert not any(b"hf_writer" in content for content in repository.files.values())
    saved = torch.load(output_dir / "checkpoint" / "training_args.bin", weights_only=False)
    assert saved.hub_model_id is None
    assert saved.hub_token is None


@pytest.mark.slow
def test_the_card_on_the_hub_is_that_of_its_step(pushed):
    hub, *_ = pushed
    for commit, step in zip(hub.repositories["alice/every-save"].commits[1:], (4, 8), strict=True):
        card = ModelCard(commit.files["README.md"].decode())
        assert f"| steps | {step} of 8 |" in card.text
        assert f"mean training reward, step {step}" in card.text


def test_an_upload_says_the_answer_behind_its_error():
    error = RuntimeError("Error while uploading 'x' to the Hub.")
    error.__cause__ = OSError("403\nquota")
    assert describe_error(error) == "RuntimeError: Error while uploading 'x' to the Hub., from OSError: 403 quota"


def test_nothing_runs_where_nothing_was_pushed():
    pushes = BackgroundPushes()
    assert not pushes.running(seconds=10)
    assert "every file is in output_dir" in str(PushError(["model of step 2: no"]))


def test_the_end_waits_for_a_push_by_hand(tmp_path, monkeypatch):
    rejected = Future()
    rejected.set_exception(OSError("403"))
    monkeypatch.setattr(GRPOTrainer, "push_to_hub", lambda self, *args, **kwargs: rejected)
    trainer = scripted_trainer(tmp_path)
    assert trainer.push_to_hub(blocking=False) is rejected
    with pytest.raises(PushError, match="OSError: 403"):
        trainer.end()


@pytest.mark.slow
def test_train_math_saves_everything_and_ends_with_an_error(pushed):
    hub, output_dir, results = pushed
    run, output_dir = results["train_math"], output_dir / "math"
    assert run.returncode == 1
    assert run.stderr.count("Quota exceeded") > 1
    assert f"model saved to {output_dir}" in run.stdout
    assert f"report written to {output_dir / 'report.html'}" in run.stdout, "whatever the Hub says"
    assert latest_complete(output_dir)[0] == output_dir / "checkpoint-4"
    final = (output_dir / "model.safetensors").read_bytes()
    assert final == (output_dir / "checkpoint-4" / "model.safetensors").read_bytes()
    listed = run.stderr.split("PushError: ")[-1]
    pushes = ["checkpoint of step 2", "model of step 4", "checkpoint of step 4", "'Model save'", "'End of training'"]
    assert [line.split(": ")[0] for line in listed.splitlines() if line.startswith("- ")] == [f"- {p}" for p in pushes]
    assert [commit.summary for commit in hub.repositories["alice/math"].commits[1:]] == ["Training in progress, step 2"]


def train_math(hub, home, arguments):
    command = [sys.executable, str(TESTS.parent / "examples" / "train_math.py"), *arguments]
    variables = environment(hub, home, HF_TOKEN="hf_writer")
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_train_math_ends_with_an_error_when_the_hub_is_gone(tmp_path, chat_model_dir, problems):
    """From the second commit on nobody answers, which the client takes half a minute to believe."""
    hub, output_dir = HubStandIn(), tmp_path / "out"
    hub.faults = [Fault("POST /api/models/alice/math/commit", 0, first=2)]
    run = train_math(hub, tmp_path / "home", train_math_arguments(chat_model_dir, problems, output_dir))
    assert run.returncode == 1
    assert "'End of training': ConnectError" in run.stderr
    assert latest_complete(output_dir)[0] == output_dir / "checkpoint-4"
    assert len(hub.repositories["alice/math"].commits) == 2


@pytest.mark.slow
def test_train_math_pushes_and_ends_well(tmp_path, chat_model_dir, problems):
    hub, output_dir = HubStandIn(), tmp_path / "out"
    arguments = train_math_arguments(chat_model_dir, problems, output_dir, "--hub_private_repo", "true")
    run = train_math(hub, tmp_path / "home", arguments)
    hub.close()
    assert run.returncode == 0, run.stderr[-3000:]
    repository = hub.repositories["alice/math"]
    assert repository.private
    model = {path: content for path, content in repository.files.items() if not path.startswith("last-checkpoint/")}
    assert (output_dir / "report.html").is_file()
    assert model == local_files(output_dir, leave_out=("report.html",)), "the report is of megabytes and stays here"
    assert below(repository.files, "last-checkpoint") == local_files(output_dir / "checkpoint-4")
    assert "| dataset | `problems.jsonl` |" in repository.files["README.md"].decode()


@pytest.mark.slow
def test_two_ranks_hear_the_same(tmp_path):
    """Only the first asks and pushes; both refuse, wait and raise alike."""
    hub = HubStandIn()
    hub.repositories |= {"alice/there": Repository(), "bob/public": Repository()}
    hub.faults = [*map(replace, QUOTA), Fault("GET /api/models/alice/down/auth-check", 500, "Internal Server Error")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(TESTS / "hub_run.py"), str(tmp_path), "refused", "slow", "quota",
    ]  # fmt: skip
    variables = environment(hub, tmp_path / "home", ACCELERATE_USE_CPU="true")
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    hub.close()
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"results.{rank}.json").read_text()) for rank in (0, 1))
    for case in ("refused", "slow", "quota"):
        assert first[case]["result"] == second[case]["result"]
    assert len(first["refused"]["result"]) == len(REFUSALS)
    assert first["slow"]["result"] == {"step": 8, "failures": []}
    assert len(first["quota"]["result"]["failures"]) == 2
    assert [name for name, _ in first["quota"]["result"]["raised"]] == ["PushError"] * 3
    assert not second["quota"]["log"], "one rank says it"
    assert below(hub.repositories["alice/slow"].files, "last-checkpoint").keys() >= {
        "rng_state_0.pth",
        "rng_state_1.pth",
        MARKER,
    }
