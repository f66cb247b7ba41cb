"""Two processes make the update of one: plain data parallel for real, with gloo. Other engines: test_engines.py."""

import itertools
import json
from unittest import mock

import pytest
import torch

from engines import (
    BAD_NUMBERS,
    CASES,
    EVALUATE_MATH,
    EVALUATION,
    EVALUATIONS,
    RESUMED_FROM,
    SELF_TESTS,
    SETUP,
    STOPPED,
    check_bad_number,
    evaluating_trainer,
    relative_difference,
    single_process,
    two_processes,
)
from opo_trl.runs.checkpoints import incomplete_reason, latest_complete, mark_complete
from opo_trl.scripts import evaluate_math
from test_evaluate_math import files
from test_resume import prompts_of_each_step, sampling_trainer
from tiny import SCRIPT, relative_error, tiny_model
from waves_script import INTERRUPTED, STREAMED, plain_update, streamed_update

QUICK = ["full", "full, evaluated first", "full, uncertainty", "full, empty completions"]
QUICK += ["every column", "token uncertainty", "LoRA", "one micro-batch", "dr_grpo", "idle rank"]
QUICK += ["full, refilled", "full, chosen prompts"]
PREEMPTED = ["preempted", "preempted, LoRA", "preempted, refilled", "preempted, chosen prompts"]
FULL_DISK = "full disk on rank 1"
# A vLLM server that the main process alone talks to, and what both ranks raise.
SERVERS = {
    "server dies": "failed while generating: ConnectionError: ",
    "server refuses": "failed while taking new weights: /collective_rpc answers 500: ",
    "server restarts": "failed while generating: the policy is version ",
    "server without extension": "got 'none'. Restart it with `--worker-extension-cls ",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The quick cases in one pair of processes, whose start costs more than the training: outcomes and folder."""
    directory = tmp_path_factory.mktemp("ddp")
    return two_processes("ddp", [*QUICK, *STOPPED, *STREAMED], directory), directory


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory):
    """The other cases in one more pair of processes."""
    directory = tmp_path_factory.mktemp("ddp")
    cases = [*EVALUATIONS, *SELF_TESTS, *BAD_NUMBERS, *PREEMPTED, *INTERRUPTED]
    cases += ["infinite on one rank", "math reward", "streamed evaluation", FULL_DISK, "server", *SERVERS]
    cases += [SETUP, EVALUATION, "saved by two", "resumed by two"]
    sampling_trainer(directory / "saved by one", tiny_model()).train()
    checkpoint = directory / SETUP / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "scheduler.pt").touch()
    mark_complete(checkpoint)
    interrupt_evaluation(directory / EVALUATION)
    return two_processes("ddp", cases, directory), directory


class Killed(BaseException):
    """Nothing handles it."""


def interrupt_evaluation(output):
    """Leave what a kill after three of eight batches leaves, the last line torn."""
    judge, batches = evaluate_math.judge, []

    def judge_three(batch, completions):
        if len(batches) == 3:
            raise Killed
        batches.append(batch)
        return judge(batch, completions)

    with mock.patch.object(evaluate_math, "judge", judge_three), pytest.raises(Killed):
        evaluate_on_one_thread(output)
    (part,) = output.rglob("*.part-0.jsonl")
    assert part.read_bytes().count(b"\n") == 3 * 8
    with part.open("ab") as file:
        file.write(b'{"problem": "torn')


def evaluate_on_one_thread(output):
    """As the ranks do: another number of threads adds float noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return evaluate_math.main([*EVALUATE_MATH, "--output_dir", str(output)])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", QUICK)
def test_two_processes_equal_one(runs, tmp_path, case):
    two, one = runs[0][case], single_process(case, tmp_path)
    assert two.engine == "MULTI_CPU"
    assert relative_difference(two, one, case) < 1e-5
    assert len(two.logs) == CASES[case]["max_steps"]
    for two_log, one_log in zip(two.logs, one.logs, strict=True):
        same = {name for name in one_log if name.startswith(("opo/", "rollouts/"))} | {"reward", "entropy", "grad_norm"}
        for name in same - {"opo/padding_fraction"}:  # two ranks cut other micro-batches than one
            assert two_log[name] == pytest.approx(one_log[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", STOPPED)
def test_what_goes_wrong_on_one_rank_is_raised_on_both_with_one_message(runs, case):
    """Without agreement the other rank waits in a collective: the processes' time limit is this test's."""
    messages = [(runs[1] / case / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert STOPPED[case] in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", SELF_TESTS)
def test_an_engine_is_judged_by_all_ranks_together(slow_runs, case):
    messages = [(slow_runs[1] / case / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert SELF_TESTS[case] in messages[0]


@pytest.mark.slow
def test_a_streamed_evaluation_set_has_no_pass_at_k_and_evaluates(slow_runs):
    metrics = json.loads((slow_runs[1] / "streamed evaluation" / "metrics.json").read_text())
    assert "eval_reward" in metrics
    assert not any("pass@" in name for name in metrics)


@pytest.mark.slow
def test_an_infinite_reward_on_one_rank_stops_both_with_the_same_message(slow_runs):
    messages = [(slow_runs[1] / "infinite on one rank" / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "'infinite_on_one_rank' returned inf for row 10 of the rollout batch" in messages[0]


@pytest.mark.slow
def test_the_math_reward_on_two_ranks(slow_runs):
    """Each has workers of its own, and both log the same: every row's verdict, and means over the ranks."""
    logged = [json.loads((slow_runs[1] / "math reward" / f"logged.{rank}").read_text()) for rank in (0, 1)]
    assert logged[0] == logged[1]
    rows = len(logged[0]["verdicts"]) // 2
    assert logged[0]["verdicts"] == ["wrong", "right"] * (rows // 2) + ["too slow", "right"] * (rows // 2)
    assert logged[0]["answers"][-2:] == ["(10^{9})!", "\\sqrt{49}"]
    metrics = logged[0]["metrics"]
    assert metrics["math_verify_reward/timeouts"] == rows / 4
    assert metrics["math_verify_reward/fast_path_share"] == 0.5
    assert metrics["reward"] == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("case", EVALUATIONS)
def test_pass_at_k_counts_each_problem_once(slow_runs, tmp_path, case):
    """Against enumeration of the script, with one process and with two, whatever fills up the last batch."""
    problems, completions, _ = EVALUATIONS[case]
    two = json.loads((slow_runs[1] / case / "metrics.json").read_text())
    one = evaluating_trainer(case, tmp_path, processes=1).evaluate()
    # The rewards are those of the script's first problems, in the order of the dataset's sampler: a mean, in any order.
    correct = [[reward == 1 for _, reward in rows[:completions]] for rows in list(SCRIPT.values())[:problems]]
    for k in range(1, completions + 1):
        draws = [[any(draw) for draw in itertools.combinations(samples, k)] for samples in correct]
        expected = sum(sum(each) / len(each) for each in draws) / problems
        assert one[f"eval_pass@{k}"] == pytest.approx(expected)
        assert two[f"eval_pass@{k}"] == pytest.approx(expected)
    assert f"eval_pass@{completions + 1}" not in one


@pytest.mark.slow
@pytest.mark.parametrize("case", SERVERS)
def test_a_server_that_fails_is_raised_on_both_ranks_with_one_message(slow_runs, case):
    """Only the main process knows: without agreement the other one waits in the collective that brings completions."""
    messages = [(slow_runs[1] / case / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert SERVERS[case] in messages[0]
    if case != "server without extension":
        assert latest_complete(slow_runs[1] / case)[0].name == "checkpoint-1", "of the step before"


@pytest.mark.slow
def test_a_server_samples_for_both_ranks_from_the_weights_that_they_train(slow_runs):
    folder = slow_runs[1] / "server"
    assert [(folder / f"message.{rank}").read_text() for rank in (0, 1)] == ["trained", "trained"]
    served = torch.load(folder / "served.pt")
    for rank in (0, 1):
        trained = torch.load(folder / f"trained.{rank}.pt")
        assert len(trained) == len(served) == 3
        for weights, expected in zip(served, trained, strict=True):
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)


def check_streamed(runs, tmp_path, case):
    """The gradient, and waves that are the same on both ranks."""
    outcomes, directory = runs
    plain = plain_update(tmp_path, **STREAMED.get(case, {}))
    assert relative_error(streamed_update(outcomes[case].weights), plain) < 2e-6
    waves = [json.loads((directory / case / f"waves.{rank}").read_text()) for rank in (0, 1)]
    assert waves[0] == waves[1]


@pytest.mark.parametrize("case", STREAMED)
def test_a_streamed_step_of_two_ranks_has_the_gradient_of_one_that_is_not_streamed(runs, tmp_path, case):
    check_streamed(runs, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in INTERRUPTED if "dies" not in case])
def test_a_streamed_step_that_fails_leaves_nothing_to_the_next_one(slow_runs, tmp_path, case):
    check_streamed(slow_runs, tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", INTERRUPTED)
def test_what_ends_a_streamed_step_is_raised_on_both_ranks_with_one_message(slow_runs, case):
    messages = [(slow_runs[1] / case / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert INTERRUPTED[case] in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", PREEMPTED)
def test_a_rank_that_is_asked_to_stop_stops_all_and_they_go_on_to_the_same_bits(slow_runs, case):
    """In the middle of the second epoch."""
    for rank in (0, 1):
        ended = json.loads((slow_runs[1] / case / f"ended.{rank}").read_text())
        assert "must be a checkpoint's directory, got 'not-there'" in ended.pop("refusal")
        expected = {"code": 75, "step": 5, "same bits": True, "last step": 8, "refills": "refilled" in case}
        assert ended == expected
    asked = slow_runs[1] / case / "asked"
    assert incomplete_reason(asked / "checkpoint-5") is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (asked / "checkpoint-5").iterdir()}


@pytest.mark.slow
def test_a_run_that_is_resumed_by_another_number_of_processes_takes_the_same_prompts(slow_runs, tmp_path, caplog):
    """From two to one and from one to two, in the middle of the second epoch; every step, not just every epoch."""
    two = json.loads((slow_runs[1] / "saved by two" / "prompts.json").read_text())
    resumed_by_two = json.loads((slow_runs[1] / "resumed by two" / "prompts.json").read_text())
    trainer = sampling_trainer(tmp_path, tiny_model())
    resumed_by_one = prompts_of_each_step(trainer)
    trainer.train(resume_from_checkpoint=str(slow_runs[1] / "saved by two" / f"checkpoint-{RESUMED_FROM}"))
    assert len(two) == 8
    assert [list(step) for step in resumed_by_one] == resumed_by_two == two[RESUMED_FROM:]
    assert "saved by 2 process(es) and is resumed by 1: each step takes the prompts" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_a_bad_number_on_one_rank_stops_both_before_anything_is_saved(slow_runs, case):
    check_bad_number(slow_runs[1] / case)


@pytest.mark.slow
def test_a_full_disk_on_one_rank_is_said_on_both_and_costs_no_checkpoint(slow_runs):
    messages = [(slow_runs[1] / FULL_DISK / f"message.{rank}").read_text() for rank in (0, 1)]
    assert "checkpoint-2 could not be saved: another rank failed" in messages[0]
    assert "checkpoint-2 could not be saved: [Errno 28] No space left on device" in messages[1]
    assert all("checkpoint-1 is complete: free space and resume from it" in message for message in messages)
    assert latest_complete(slow_runs[1] / FULL_DISK)[0].name == "checkpoint-1"


@pytest.mark.slow
def test_an_error_of_the_setup_on_one_rank_is_raised_on_both(slow_runs):
    """The main process decides what to resume, and prints for both."""
    results = [json.loads((slow_runs[1] / SETUP / f"results.{rank}").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]
    message, found, refused = results[0]
    assert message == "problems.jsonl is not on this machine (on rank 1)"
    assert found == str(slow_runs[1] / SETUP / "run" / "checkpoint-1")
    assert "needs a complete checkpoint in" in refused
    printed = [(slow_runs[1] / SETUP / f"printed.{rank}").read_text() for rank in (0, 1)]
    assert [text.count("using use_cpu=True") for text in printed] == [1, 0]


@pytest.mark.slow
def test_an_interrupted_evaluation_is_continued_on_two_ranks_to_the_records_of_one(slow_runs, tmp_path):
    summary = evaluate_on_one_thread(tmp_path)
    assert files(slow_runs[1] / EVALUATION) == files(tmp_path)
    assert not list((slow_runs[1] / EVALUATION).rglob("*.part-*"))
    continued = json.loads((slow_runs[1] / EVALUATION / "summary.json").read_text())
    assert continued["models"] == summary["models"]
    assert continued["processes"] == 2
    assert 0.2 < summary["models"]["tiny_policy"]["arithmetic"]["pass@1"]["mean"] < 0.7
