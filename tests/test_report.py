"""What a report is made of: the files of a run, groups, curves and findings, compared with independent computations."""

import builtins
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from opo_trl import OPOConfig
from opo_trl.report import write_report
from opo_trl.report.charts import absent, arrange
from opo_trl.report.findings import RULES, Evidence, evaluate, find
from opo_trl.report.groups import group_rows
from opo_trl.report.meanings import MEANINGS, meanings
from opo_trl.report.metrics import Series, metric_series
from opo_trl.report.page import SHOWN_SETTINGS, describe
from opo_trl.report.run_files import choose_steps, read_run
from opo_trl.scripts import cli
from spoilt_runs import PROSE, TITLES, spoilt_run
from tiny import tiny_model, tiny_tokenizer

pytest.importorskip("plotly", reason="the report needs plotly: pip install plotly")


def make_rows(step, groups=4, size=4, seed=0, **columns):
    """Rows of OPO's table, with rewards of all kinds."""
    rng = random.Random(f"{seed}-{step}")
    rows = []
    for group in range(groups):
        choices = rng.choice([[0.0], [1.0], [0.0, 1.0], [None], [None, 0.0, 1.0], [-1.0, 0.5]])
        for number in range(size):
            reward = rng.choice(choices)
            rows.append(
                {
                    "step": step,
                    "prompt": f"prompt {group} of step {step}",
                    "completion": f"completion {number}" * rng.randint(1, 9),
                    "scored": reward,
                    "note": "text",
                    "opo/truncated": rng.random() < 0.3,
                    "opo/reward": reward,
                    "opo/length": rng.randint(1, 40),
                    "opo/baseline": 0.5,
                    "opo/group": group,
                    "opo/split": "train",
                    "advantage": None if reward is None else reward - 0.5,
                }
                | columns
            )
    return rows


def make_run(folder, tables=None, log=None, state="trainer_state.json"):
    if log is not None:
        path = folder / state
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"log_history": log, "max_steps": 10, "global_step": 1}))
    for step, rows in (tables or {}).items():
        (folder / "completions").mkdir(exist_ok=True, parents=True)
        pd.DataFrame(rows).to_parquet(folder / "completions" / f"completions_{step:05d}.parquet")
    return folder


def log_of(**series):
    """A log of one entry per step; `_` in a name is `/`."""
    length = max(len(values) for values in series.values())
    return [
        {"step": step + 1, **{name.replace("__", "/"): values[step] for name, values in series.items()}}
        for step in range(length)
    ]


# ---- Files


def test_the_log_that_reaches_furthest_is_read(tmp_path):
    make_run(tmp_path, log=log_of(reward=[0.0] * 2), state="trainer_state.json")
    make_run(tmp_path, log=log_of(reward=[0.0] * 3), state="checkpoint-3/trainer_state.json")
    make_run(tmp_path, log=log_of(reward=[0.0] * 10), state="checkpoint-10/trainer_state.json")
    run = read_run(tmp_path)
    assert run.log_file == tmp_path / "checkpoint-10" / "trainer_state.json"
    assert (len(run.log), run.max_steps) == (10, 10)
    (tmp_path / "log.json").write_text(json.dumps(log_of(reward=[0.5] * 12)))
    assert read_run(tmp_path).log_file == tmp_path / "log.json"


def dated(folder, **seconds):
    """Set the times of files; the keys are their kinds."""
    patterns = {"checkpoints": "checkpoint-*/trainer_state.json", "log": "log.json", "tables": "completions/*"}
    for kind, second in seconds.items():
        for path in folder.glob(patterns.get(kind, f"completions/completions_*{kind.removeprefix('table')}.parquet")):
            os.utime(path, (second, second))


def test_a_shorter_run_in_the_directory_of_an_earlier_one_is_read(tmp_path):
    make_run(tmp_path, {step: make_rows(step) for step in (30, 50, 100)})
    make_run(tmp_path, log=log_of(reward=[0.1] * 100), state="checkpoint-100/trainer_state.json")
    entries = [entry for entry in log_of(reward=[0.2] * 50) if entry["step"] % 25 == 0]
    (tmp_path / "log.json").write_text(json.dumps(entries))
    dated(tmp_path, checkpoints=100, tables=100, table50=200, log=200)
    run = read_run(tmp_path)
    assert run.log_file == tmp_path / "log.json"
    assert (list(run.tables), run.earlier_tables) == ([50], (30, 100))
    content = describe(run)
    assert {group["step"] for group in content["groups"]} == {50}
    assert content["notes"][0].startswith("2 completions table(s) of an earlier run in this directory are left out")
    # The same run with checkpoints, of which the last but one is the newest.
    (tmp_path / "log.json").unlink()
    make_run(tmp_path, log=entries, state="checkpoint-50/trainer_state.json")
    assert read_run(tmp_path).log_file == tmp_path / "checkpoint-50" / "trainer_state.json"


def test_times_that_a_copy_has_changed_do_not_matter_for_a_single_run(tmp_path):
    """Nor does a metric that is no number. Tables that were written after the last log of a run that died are kept."""
    log = log_of(reward=[0.1] * 9 + [float("nan")] + [0.3] * 2)
    make_run(tmp_path, {step: make_rows(step) for step in (10, 12)})
    make_run(tmp_path, log=log[:10], state="checkpoint-10/trainer_state.json")
    (tmp_path / "log.json").write_text(json.dumps(log))
    dated(tmp_path, log=100, tables=200, checkpoints=300)
    run = read_run(tmp_path)
    assert run.log_file == tmp_path / "log.json"
    assert list(run.tables) == [10, 12]
    (tmp_path / "log.json").unlink()
    dated(tmp_path, checkpoints=100)
    run = read_run(tmp_path)
    assert run.log_file == tmp_path / "checkpoint-10" / "trainer_state.json"
    assert list(run.tables) == [10, 12]


def test_of_two_runs_in_a_copy_with_equal_times_the_longer_one_is_read(tmp_path):
    make_run(tmp_path, {5: make_rows(5), 10: make_rows(10)})
    make_run(tmp_path, log=log_of(reward=[0.1] * 10), state="checkpoint-10/trainer_state.json")
    (tmp_path / "log.json").write_text(json.dumps(log_of(reward=[0.2] * 5)))
    dated(tmp_path, log=100, tables=100, checkpoints=100)
    run = read_run(tmp_path)
    assert run.log_file == tmp_path / "checkpoint-10" / "trainer_state.json"
    assert list(run.tables) == [5, 10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "nothing", r"RUN_DIR must be the output_dir of a run, got '.*nothing', which is no dir"),
        (lambda path: path, r"must be the output_dir of a run that has logged.* Call `trainer\.save_state\(\)`"),
        (lambda path: make_run(path, log=[]), "which has none of trainer_state.json"),
    ],
)
def test_a_directory_without_a_run_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        read_run(make(tmp_path))


def test_a_log_that_is_no_json_is_named(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [')
    with pytest.raises(ValueError, match=r"trainer_state\.json must be JSON that a trainer has written.* Remove it"):
        read_run(tmp_path)


@pytest.mark.parametrize("share", [0, 0.5])
def test_a_table_that_a_kill_has_cut_short_is_named(tmp_path, share):
    table = make_run(tmp_path, {1: make_rows(1), 2: make_rows(2)}) / "completions" / "completions_00002.parquet"
    table.write_bytes(table.read_bytes()[: int(share * table.stat().st_size)])
    with pytest.raises(ValueError, match=r"completions_00002\.parquet must be a complete table.* Remove it"):
        write_report(tmp_path)
    table.unlink()
    assert write_report(tmp_path).exists()


def test_the_steps_that_fit_are_evenly_spaced_with_the_first_and_the_last():
    tables = dict.fromkeys(range(10, 1010, 10), 64)
    assert choose_steps(tables, 6400) == list(tables)
    chosen = choose_steps(tables, 640)
    assert (chosen[0], chosen[-1], len(chosen)) == (10, 1000, 10)
    assert {second - first for first, second in itertools.pairwise(chosen)} == {110}
    assert choose_steps(tables, 1) == [1000]
    assert choose_steps(tables, 1, steps=[500, 20]) == [20, 500]
    with pytest.raises(ValueError, match=r"--steps must be steps with a completions table, got 15\. This run has tab"):
        choose_steps(tables, 640, steps=[10, 15])


# ---- Groups


@pytest.mark.parametrize("seed", range(5))
def test_group_statistics_are_those_of_pandas(seed):
    rows = make_rows(3, groups=12, seed=seed)
    groups = group_rows(rows, ["scored"])
    frame = pd.DataFrame(rows).groupby("opo/group")["scored"]
    assert [len(group.completions) for group in groups] == [4] * 12
    assert [group.none_positive() for group in groups] == list(frame.max() <= 0)  # False for NaN: all are unscorable
    assert [group.all_equal() for group in groups] == list(frame.max() == frame.min())
    unscorable = [[each.unscorable for each in group.completions] for group in groups]
    assert unscorable == [list(values.isna()) for _, values in frame]
    assert [group.prompt for group in groups] == [[("", f"prompt {group} of step 3")] for group in range(12)]


def test_a_prompt_that_comes_twice_in_sequence_makes_two_groups_where_the_run_has_numbered_them():
    rows = make_rows(1, groups=2, prompt="the same")
    assert [len(group.completions) for group in group_rows(rows)] == [4, 4]
    plain = [{name: value for name, value in row.items() if not name.startswith("opo/")} for row in rows]
    assert [len(group.completions) for group in group_rows(plain)] == [8]


def test_what_a_table_lacks_is_none():
    row = {"step": 1, "prompt": "p", "completion": "c", "one": 0.5, "two": None, "note": "n", "advantage": 0.1}
    (group,) = group_rows([row], ["one", "two"])
    (completion,) = group.completions
    assert (completion.length, completion.baseline, completion.truncated, completion.logps) == (None,) * 4
    assert completion.reward is None, "the weights of two functions are unknown"
    assert completion.rewards == {"one": 0.5, "two": None}
    assert not completion.unscorable
    assert completion.extra == {"note": "n"}
    assert group.scores() == []
    assert group.scores("one") == [0.5]
    (without_names,) = group_rows([row])
    assert without_names.completions[0].rewards == {"one": 0.5}
    assert without_names.completions[0].reward == 0.5


def test_conversations_and_tool_calls_are_read(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    picture = [{"type": "image", "text": None}, {"type": "text", "text": "1+2"}]
    prompt = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {"role": "user", "content": picture},
    ]
    completion = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "It is 3", "reasoning_content": "hm"},
    ]
    row = {"step": 1, "prompt": prompt, "completion": completion, "score": 1.0, "advantage": 0.0}
    make_run(tmp_path, {1: [row, row]})
    content = describe(read_run(tmp_path))
    (group,) = content["groups"]
    assert group["prompt"] == [("system", "be brief"), ("user", "[image]1+2")]
    messages = group["rows"][0]["messages"]
    assert [role for role, _ in messages] == ["assistant", "tool", "assistant"]
    assert json.loads(messages[0][1]) == call
    assert [text for _, text in messages[1:]] == ["3", "hm\nIt is 3"]


# ---- Curves


def test_every_metric_is_in_exactly_one_chart_and_has_all_its_points():
    log = [
        {
            "step": 1,
            "loss": 0.0,
            "reward": 0.1,
            "time/generate": 1.0,
            "time/update": 2.0,
            "tokens_per_second/trained": 5,
        },
        {"step": 2, "reward": None, "grad_norm": float("nan"), "time/generate": 1.5, "own/metric": 3},
        {"step": 2, "eval_reward": 0.4, "eval_own": 1.0, "epoch": 0.1},
        {"step": 3, "reward": 0.3, "time/generate": 1.0, "time/update": 2.0, "tokens_per_second/trained": 6},
        {"step": 3, "train_runtime": 8.0, "total_flos": 0.0},
    ]
    metrics = metric_series(log)
    assert metrics["reward"] == Series([1, 3], [0.1, 0.3])
    assert metrics["time/generate"] == Series([1, 2, 3], [1.0, 1.5, 1.0])
    assert "grad_norm" not in metrics
    assert "train_runtime" not in metrics
    sections = arrange(metrics)
    assert [section.title for section in sections] == ["Metrics", "Time per phase", "All other metrics"]
    placed = [line.metric for section in sections for chart in section.charts for line in chart.lines]
    constant = [name for section in sections for name in section.constant]
    assert sorted(placed + constant) == sorted(metrics)
    assert constant == ["loss", "own/metric", "eval_own"]
    assert [line.metric for line in sections[0].charts[0].lines] == ["reward", "eval_reward"]
    assert [chart.stacked for chart in sections[1].charts] == [True, False]


def test_what_never_changes_is_not_drawn():
    log = log_of(
        learning_rate=[1e-6] * 4, reward=[0.0, 0.5, 0.5, 0.5], completions__clipped_ratio=[0.0, 0.5, 1.0, 1.0],
        time__sync_weights=[0.0] * 4, time__score=[1.0] * 4, time__update=[1.0, 2.0, 1.0, 1.0],
    )  # fmt: skip
    first, times = arrange(metric_series(log))
    assert [chart.title for chart in first.charts] == ["reward", "completions/clipped_ratio"]
    assert [chart.fraction for chart in first.charts] == [False, True]
    assert first.constant == ["learning_rate"]
    assert [line.label for line in times.charts[0].lines] == ["score", "update"], "a phase that takes time is drawn"
    assert times.constant == ["time/sync_weights"]
    assert absent(metric_series(log)) == ["completions/mean_length", "entropy", "grad_norm", "frac_reward_zero_std"]
    untrained = absent(metric_series(log_of(reward=[1.0], opo__informative_fraction=[0.0])))
    assert "entropy (an average over trained tokens, of which there were none)" in untrained


def test_meanings_are_those_of_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    documented = dict(re.findall(r"^\| `([^`]+)` \| ([^|]*?) \|", page, re.MULTILINE))
    plain = {name: re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text).replace("`", "") for name, text in documented.items()}
    assert {name: plain.get(name) for name in MEANINGS} == MEANINGS
    assert meanings(["eval_reward", "rewards/own/mean", "unknown"]) == {
        "eval_reward": MEANINGS["reward"], "rewards/own/mean": MEANINGS["rewards/NAME/mean"],
    }  # fmt: skip


# ---- Findings


def titles(**series):
    return [finding.title for finding in find(Evidence(metric_series(log_of(**series)), []))]


@pytest.mark.parametrize(
    ("series", "title"),
    [
        ({"completions__clipped_ratio": [0.0, 0.0, 0.2, 1.0]}, "All completions are truncated"),
        ({"completions__clipped_ratio": [1.0, 1.0, 1.0, 0.4]}, None),
        ({"reward": [1.0, 1.0], "reward_std": [0.0, 0.0]}, "The reward is always 1"),
        ({"reward": [1.0, 1.0], "reward_std": [0.0, 0.1]}, None),
        ({"opo__informative_fraction": [0.9, 0.9, 0.9, 0.0]}, "No learning signal"),
        ({"frac_reward_zero_std": [0.0, 0.0, 0.0, 0.95]}, "Little learning signal"),
        ({"opo__informative_fraction": [0.9] * 4, "frac_reward_zero_std": [1.0] * 4}, None),
        ({"opo__unscorable_fraction": [0.0, 0.25]}, "25 % of the completions are unscorable"),
        ({"reward": [0.5] * 6 + [0.4] * 2, "reward_std": [0.1] * 8}, "The reward falls"),
        ({"reward": [0.5] * 6 + [0.48] * 2, "reward_std": [0.1] * 8}, None),
        ({"completions__mean_length": [10.0] * 6 + [21.0] * 2}, "Completions get longer"),
        ({"completions__mean_length": [10.0] * 6 + [4.0] * 2}, "Completions get shorter"),
        ({"entropy": [0.5] * 6 + [0.04] * 2}, "The entropy collapses"),
        ({"grad_norm": [1.0] * 7 + [11.0]}, "The gradient norm jumps"),
        ({"grad_norm": [1.0] * 7 + [9.0]}, None),
        ({"grad_norm": [1.0, 11.0]}, None),
        ({"reward": [0.0] * 8, "entropy": [0.0] * 8, "grad_norm": [0.0] * 7 + [1.0]}, None),
        ({"reward": [-0.4] * 6 + [-0.5] * 2}, "The reward falls"),
    ],
)
def test_rules_on_the_log(series, title):
    assert titles(**series) == ([] if title is None else [title])


def test_unscorable_completions_can_be_shown():
    (finding,) = find(Evidence(metric_series(log_of(opo__unscorable_fraction=[0.0, 0.25])), []))
    assert finding.filter == "unscorable"
    assert finding.advice == "Find out why the reward function cannot score them."


def test_rules_on_completions():
    half = [
        *make_rows(1, groups=1, scored=0.0, verdict="no answer"),
        *make_rows(2, groups=1, scored=1.0, verdict="right"),
    ]
    for row in half:
        row["opo/reward"] = row["scored"]
    found = find(Evidence({}, [*group_rows(half[:4], ["scored"]), *group_rows(half[4:], ["scored"])]))
    assert [finding.title for finding in found] == [
        "50 % of the completions have no boxed answer", "No reward above 0 in 50 % of the groups",
    ]  # fmt: skip
    held_out = [{**row, "opo/split": "eval"} for row in half[:4]]
    assert find(Evidence({}, group_rows(held_out, ["scored"]))) == []


@pytest.mark.parametrize("unscorable", [0, 1])
def test_the_examples_of_a_constant_reward_have_rewards(unscorable):
    rows = make_rows(1, groups=1, size=4, scored=0.0)
    for number, row in enumerate(rows):
        row |= {"completion": f"it is {number}", "opo/reward": 0.0}
    rows[unscorable] |= {"scored": None, "opo/reward": None}
    log = {"reward": [0.0] * 4, "reward_std": [0.0] * 4}
    found = find(Evidence(metric_series(log_of(**log)), group_rows(rows, ["scored"])))
    examples = next(finding.examples for finding in found if finding.title == "The reward is always 0")
    assert [title for title, _ in examples if title.startswith("reward")] == ["reward 0", "reward 0"]


@pytest.mark.parametrize("kind", [*TITLES, "healthy"])
def test_a_spoilt_run_is_seen_at_first_sight(tmp_path, kind):
    run = read_run(spoilt_run(kind, tmp_path))
    content = describe(run)
    found = [finding["title"] for finding in content["findings"]]
    assert found == ([] if kind == "healthy" else [TITLES[kind]]), "one cause, one finding"
    results = [result for _, result in content["rules"]]
    assert len(results) == len(RULES)
    consequences = [each for finding in content["findings"] for each in finding["consequences"]]
    assert results.count("found") == len(found) + len(consequences)
    assert len(consequences) == {"truncated": 4, "no boxes": 3, "always 1": 1, "healthy": 0}[kind]
    assert all(each["advice"] == "" for each in consequences)
    assert [group["solution"] for group in content["groups"]] == ["12"] * len(content["groups"])
    facts = dict(content["facts"])
    assert (facts["num_generations"], facts["learning_rate"], facts["loss_type"]) == ("4", "0.001", "dapo")
    assert "opo-trl" in facts["versions"]
    assert not [name for name in content["settings"] if name.endswith("_token")]
    if kind == "truncated":
        assert "`max_completion_length` is 32, but the longest have 6 tokens." in content["findings"][0]["text"]
    if kind == "no boxes":
        labels, texts = zip(*content["findings"][0]["examples"], strict=True)
        assert labels == ("prompt", "solution", "no answer", "no answer", "no answer")
        assert texts[1] == "12"
        assert set(texts[2:]) < set(PROSE)
    if kind == "always 1":
        assert "`always_one`" in content["findings"][0]["text"]
        assert [what for what, _ in content["findings"][0]["examples"]] == [
            "prompt",
            "solution",
            "reward 1",
            "reward 1",
        ]


def test_a_few_unscorable_completions_explain_nothing():
    def found(share):
        return find(
            Evidence(metric_series(log_of(opo__unscorable_fraction=[share], opo__informative_fraction=[0.0])), [])
        )

    assert [each.title for each in found(0.1)] == ["10 % of the completions are unscorable", "No learning signal"]
    assert [each.title for each in found(0.9)] == ["90 % of the completions are unscorable"]


def test_what_half_of_the_completions_have_explains_nothing():
    found = find(Evidence(metric_series(log_of(completions__clipped_ratio=[0.6], opo__informative_fraction=[0.0])), []))
    assert [finding.title for finding in found] == ["60 % of the completions are truncated", "No learning signal"]
    found = find(Evidence(metric_series(log_of(completions__clipped_ratio=[0.9], opo__informative_fraction=[0.0])), []))
    assert [finding.title for finding in found] == ["90 % of the completions are truncated"]
    assert [finding.title for finding in found[0].consequences] == ["No learning signal"]


def test_truncation_at_the_limit_and_before_it_have_different_advice():
    """By the longest completion of some steps, not of every one; a tool's output counts towards the limit alone."""
    lengths = {"completions__max_length": [20.0, 20.0, 20.0, 32.0, 20.0, 20.0, 20.0, 32.0]}
    for limit, tools, early in ((None, {}, False), (32, {}, False), (34, {}, False), (64, {}, True),
                                (64, {"tools__call_frequency": [1.0] * 8}, False)):  # fmt: skip
        log = log_of(completions__clipped_ratio=[0.9] * 8, **lengths, **tools)
        finding = find(Evidence(metric_series(log), [], limit))[0]
        assert ("Raise `max_completion_length`" in finding.advice) != early, (limit, tools)
        assert ("the longest have 32 tokens" in finding.text) == early, (limit, tools)


def test_each_rule_is_found_or_not_or_could_not_be_evaluated():
    log = log_of(completions__clipped_ratio=[1.0] * 8, grad_norm=[1.0] * 8, entropy=[1.0] * 7 + [None])
    results = [result for _, result in evaluate(Evidence(metric_series(log), []))]
    assert results[0] == "found"
    assert results[1] == "not evaluated: the run has no verdicts of math_verify_reward in its completions"
    assert results[-2] == "not evaluated: the run has no entropy, logged 8 times or more"
    assert results[-1] == "not found"
    results = [result for _, result in evaluate(Evidence({}, []))]
    missing = {result.removeprefix("not evaluated: the run has no ") for result in results}
    assert "opo/informative_fraction or frac_reward_zero_std" in missing
    assert "opo/unscorable_fraction or rewards in its completions" in missing


def test_settings_of_the_header_are_fields_of_the_config():
    assert set(SHOWN_SETTINGS) <= {field.name for field in fields(OPOConfig)}


def test_a_column_of_solutions_without_one_is_not_shown(tmp_path):
    content = describe(read_run(make_run(tmp_path, {1: make_rows(1, **{"opo/solution": None})})))
    assert not content["has"]["solution"]
    assert {group["solution"] for group in content["groups"]} == {None}


# ---- The file


def test_a_run_without_completions_has_curves_and_is_told_how_to_log_them(tmp_path):
    content = describe(read_run(make_run(tmp_path, log=log_of(reward=[0.1, 0.2]))))
    assert content["metrics"]["reward"]["values"] == [0.1, 0.2]
    assert content["groups"] == []
    assert len(content["notes"]) == 1
    assert "`log_completions=True`" in content["notes"][0]
    with pytest.raises(ValueError, match=r"got 3\. This run has no completions tables"):
        write_report(tmp_path, steps=[3])


def test_a_run_without_a_log_has_completions(tmp_path):
    content = describe(read_run(make_run(tmp_path, {5: make_rows(5)})))
    assert len(content["groups"]) == 4
    assert content["functions"] == ["scored"]
    assert "`trainer.save_state()`" in content["notes"][0]


def test_the_report_of_a_plain_grpo_trainer(tmp_path):
    def short(completions, **kwargs):
        return [float(-len(completion[0]["content"])) for completion in completions]

    def varied(completions, **kwargs):
        return [float(i % 2) if i else None for i in range(len(completions))]

    tokenizer = tiny_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1"}]} for n in range(4)]
    arguments = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, num_generations=2, max_steps=2,
        per_device_train_batch_size=4, max_completion_length=4, logging_steps=1, log_completions=True,
        num_completions_to_print=0, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(tiny_model(), [short, varied], arguments, Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_state()
    content = describe(read_run(tmp_path))
    assert content["functions"] == content["judges"] == ["short", "varied"]
    assert content["has"] == {
        "reward": False, "advantage": True, "length": False, "baseline": False, "truncated": False, "logps": False,
        "verdict": False, "solution": False,
    }  # fmt: skip
    assert [len(group["rows"]) for group in content["groups"]] == [2] * 4
    assert content["groups"][0]["prompt"][0][0] == "user"
    assert write_report(tmp_path).stat().st_size > 1e6


def test_the_file_loads_nothing_and_holds_no_markup_of_a_completion(tmp_path):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--"
    make_run(tmp_path, {1: make_rows(1, completion=hostile, prompt=hostile, note=hostile)}, log_of(reward=[0.0]))
    text = write_report(tmp_path).read_text()
    assert "alert(1)" in text
    assert hostile not in text
    assert "<script>alert" not in text
    assert "default-src 'none'" in text
    start = text.index('<script id="data" type="application/json">')
    data = text[start : text.index("</script>", start)].partition(">")[2]
    assert json.loads(data)["groups"][0]["rows"][0]["messages"] == [["", hostile]]


def test_the_command(tmp_path, capsys):
    run = make_run(tmp_path / "run", {1: make_rows(1), 2: make_rows(2)}, log_of(reward=[0.0, 0.1]))
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report written to {run / 'report.html'}\n"
    other = tmp_path / "other.html"
    assert cli.main(["report", str(run), "--output", str(other), "--steps", "2"]) == 0
    assert "prompt 0 of step 2" in other.read_text()
    assert "prompt 0 of step 1" not in other.read_text()
    for arguments, message in [
        ([str(tmp_path / "none")], "which is no directory"),
        ([str(run), "--steps", "7"], "must be steps with a completions table, got 7"),
        ([str(run), "--max_completions", "0"], "must be at least 1, got 0"),
        ([str(run), "--output", str(tmp_path / "none" / "a.html")], "directory of the output file must exist"),
    ]:
        assert cli.main(["report", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_without_plotly_the_error_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == "plotly":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    run = make_run(tmp_path, log=log_of(reward=[0.0]))
    with pytest.raises(ImportError, match=r"needs the package plotly.* the extra `report`: pip install plotly pyarrow"):
        write_report(run)
    assert not (tmp_path / "report.html").exists()


def test_the_help_of_the_command_loads_no_package():
    code = (
        "import sys\n"
        "from opo_trl.scripts.cli import main\n"
        "try:\n"
        "    main(['report', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets', 'numpy', 'pyarrow', 'plotly', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "RUN_DIR" in printed
    assert "--max_completions" in printed


def test_ten_thousand_completions_make_a_file_in_seconds(tmp_path):
    tables = {step: make_rows(step, groups=64, size=8) for step in range(1, 21)}
    run = make_run(tmp_path, tables, log_of(reward=[0.1] * 20))
    start = time.perf_counter()
    path = write_report(run)
    assert time.perf_counter() - start < 60  # 2 s alone on a core
    assert path.stat().st_size < 20e6
