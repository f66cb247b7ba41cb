"""Every engine makes the same update: two CPU processes under each against one, and what they save."""

import importlib.util
from functools import cache

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from engines import (
    AUTO_STAGES,
    BAD_NUMBERS,
    CONFIGS,
    ENGINES,
    EVERY_ENGINE,
    SELF_TESTS,
    accelerate_config,
    check_bad_number,
    ends_of_two_processes,
    loaded_difference,
    read_outcome,
    relative_difference,
    single_process,
    two_processes,
)
from opo_trl.runs.checkpoints import latest_complete
from tiny import relative_error
from waves_script import STREAMED, plain_update, streamed_update

SHARDED = {"fsdp2", "zero3"}
REFUSED = {"zero2": ["mismatched accumulation"], "zero3": ["evaluated first"]}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Folder of an engine's runs; all cases go through one pair of processes, since their start costs the most."""

    @cache
    def run(engine):
        if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed: `make test-slow` installs it")
        directory = tmp_path_factory.mktemp(engine)
        cases = [*EVERY_ENGINE, *BAD_NUMBERS, *SELF_TESTS, *STREAMED, "generating", *REFUSED.get(engine, [])]
        cases += ["streamed, reward fails"] if engine == "fsdp2" else []
        two_processes(engine, cases, directory)
        return directory

    return run


@pytest.fixture(scope="module")
def auto_run_of(tmp_path_factory):
    @cache
    def run(engine):
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed: `make test-slow` installs it")
        directory = tmp_path_factory.mktemp("auto")
        two_processes(engine, ["full, AdamW", "LoRA"], directory)
        return directory

    return run


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory):
    return cache(lambda case: single_process(case, tmp_path_factory.mktemp("one-process")))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_ENGINE)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_equals_one_process(run_of, reference_of, engine, case):
    outcome = read_outcome(run_of(engine) / case)
    assert outcome.engine == ENGINES[engine], "another engine ran"
    assert (outcome.held_share < 0.6) == (engine in SHARDED)
    assert outcome.checkpoints_activations == ("checkpointing" in case)
    assert relative_difference(outcome, reference_of(case), case) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "LoRA", "DoRA"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_saves_loads_back(run_of, engine, case):
    assert loaded_difference(read_outcome(run_of(engine) / case), case) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_samples_trains_evaluates_and_saves(run_of, engine):
    outcome = read_outcome(run_of(engine) / "generating")
    assert outcome.engine == ENGINES[engine]
    assert (outcome.held_share < 0.6) == (engine in SHARDED)
    assert len(outcome.logs) == 2
    assert all(log["grad_norm"] > 0 for log in outcome.logs)
    assert (outcome.saved / "model.safetensors").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", SELF_TESTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_self_test_of_vllm_scores_with_sharded_weights(run_of, engine, case):
    messages = [(run_of(engine) / case / f"message.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert SELF_TESTS[case] in messages[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", STREAMED)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_streamed_step_has_the_gradient_of_one_that_is_not_streamed(run_of, tmp_path, engine, case):
    if engine.startswith("zero") and STREAMED[case].get("loss_type") != "dr_grpo":
        messages = [(run_of(engine) / case / f"message.{rank}").read_text() for rank in (0, 1)]
        assert all("`loss_type` must be 'dr_grpo' under DeepSpeed, got 'dapo'" in message for message in messages)
        return
    outcome = read_outcome(run_of(engine) / case)
    assert outcome.engine == ENGINES[engine]
    assert relative_error(streamed_update(outcome.weights), plain_update(tmp_path, **STREAMED[case])) < 2e-6


@pytest.mark.slow
def test_a_step_that_has_failed_under_fsdp_is_not_followed_by_another_one(run_of):
    """Its gradients stay in FSDP, and `zero_grad` does not reach them."""
    for rank in (0, 1):
        folder = run_of("fsdp2") / "streamed, reward fails"
        assert "OverflowError: rank 1 only" in (folder / f"message.{rank}").read_text()
        assert "Under DeepSpeed and FSDP a step must not end" in (folder / "again" / f"message.{rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full, AdamW", "LoRA"])
@pytest.mark.parametrize("engine", AUTO_STAGES)
def test_a_deepspeed_configuration_of_auto_values_equals_one_process(auto_run_of, reference_of, engine, case):
    """
    A file, as accelerate's `deepspeed_config_file` has it, started by torchrun.

    `OPOConfig(deepspeed=...)` takes the same file, but on a CPU transformers passes no backend then: each process would
    train alone.
    """
    outcome = read_outcome(auto_run_of(engine) / case)
    assert outcome.engine == "DEEPSPEED"
    assert (outcome.held_share < 0.6) == (AUTO_STAGES[engine] == 3)
    assert relative_difference(outcome, reference_of(case), case) < 1e-4


@pytest.mark.slow
def test_a_deepspeed_accumulation_other_than_the_trainers_is_refused(run_of):
    message = (run_of("zero2") / "mismatched accumulation" / "message.0").read_text()
    assert "gradient_accumulation_steps=3 vs hf gradient_accumulation_steps=2" in message


@pytest.mark.slow
def test_training_after_an_evaluation_without_an_optimizer_is_refused(run_of):
    message = (run_of("zero3") / "evaluated first" / "message.0").read_text()
    assert "Set eval_on_start=True" in message


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_NUMBERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_number_on_one_rank_stops_both_before_anything_is_saved(run_of, engine, case):
    check_bad_number(run_of(engine) / case)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rank"), [("zero2", 1), ("zero3", 1), ("fsdp2", 0)])
def test_a_full_disk_on_one_rank_ends_both_within_the_engines_collectives(tmp_path, engine, rank):
    """The other rank waits for this one inside of the save: that one ends, and neither waits for the timeout."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: `make test-slow` installs it")
    case = f"full disk on rank {rank}"
    (end,) = ends_of_two_processes(engine, [case], tmp_path, timeout=200)
    assert end.code == 1, end.printed
    message = (tmp_path / case / f"message.{rank}").read_text()
    assert "checkpoint-2 could not be saved: [Errno 28] No space left on device" in message
    assert "checkpoint-1 is complete: free space and resume from it" in message
    assert message in end.printed, "and not in a file alone"
    assert latest_complete(tmp_path / case)[0].name == "checkpoint-1"


@pytest.mark.slow
def test_two_machines_equal_one_process(tmp_path, reference_of):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: `make test-slow` installs it")
    outcome = two_processes("zero3", ["full"], tmp_path, num_machines=2)["full"]
    assert outcome.engine == "DEEPSPEED"
    assert relative_difference(outcome, reference_of("full"), "full") < 1e-4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    """accelerate refuses keys that it does not know; its own reader fills what is left out."""
    config = load_config_from_file(str(path))
    raw = yaml.safe_load(path.read_text())
    assert config.num_processes == raw["num_processes"]
    assert config.distributed_type.value == raw["distributed_type"]
    assert config.num_processes % config.num_machines == 0
    assert "gradient_accumulation_steps" not in raw.get("deepspeed_config", {}), "the trainer's would be refused"


def test_the_tested_configurations_are_the_shipped_ones():
    for engine in set(ENGINES) - {"ddp"}:
        shipped = yaml.safe_load((CONFIGS / f"{engine}.yaml").read_text())
        tested = accelerate_config(engine)
        on_the_cpu = {"use_cpu", "num_processes", "mixed_precision"}
        assert {name for name in tested if tested[name] != shipped.get(name)} <= on_the_cpu
