"""`examples/evaluate_math.py` as people run it: any number of processes, killed and continued, averaged, compared."""

import json
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from engines import ROOT, run_ranks
from opo_trl.evaluation import pass_rates
from opo_trl.evaluation.records_file import append_records, merge_parts, part_path, read_parts, read_records
from opo_trl.evaluation.sampling import tokenize_prompt
from opo_trl.scripts import evaluate_math, policies, train_math
from opo_trl.scripts.arithmetic import load_arithmetic
from opo_trl.scripts.policies import model_path
from opo_trl.scripts.problems import load_problems
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

SCRIPT = str(ROOT / "examples" / "evaluate_math.py")
POLICY = model_path("tiny_policy")
ONE_DATASET = ["--models", "tiny_policy", "--datasets", "arithmetic", "--num_problems", "48", "--num_samples", "4",
               "--max_new_tokens", "40", "--temperature", "1.0", "--batch_size", "8", "--backend", "transformers",
               "--base_model", "tiny_policy", "--scoring_batch_size", "16"]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """As in the subprocesses: another number of threads adds float noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gsm8k(tmp_path):
    """Sums in GSM8K's columns."""
    path = tmp_path / "gsm8k.jsonl"
    rows = load_arithmetic("train", 24)
    path.write_text(
        "".join(
            json.dumps({"question": row["problem"], "answer": f"{row['steps']}\n#### {row['answer']}"}) + "\n"
            for row in rows
        )
    )
    return str(path)


def run(*arguments):
    return evaluate_math.main([str(argument) for argument in arguments])


def files(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.rglob("*.jsonl"))}


@pytest.mark.slow
def test_two_processes_one_and_a_killed_run_give_the_same_records(tmp_path):
    """One process here; another one killed half-way and continued by two. Interrupted only: test_distributed.py."""
    summary = run(*ONE_DATASET, "--output_dir", tmp_path / "one")
    output = tmp_path / "two"
    command = [sys.executable, SCRIPT, *ONE_DATASET, "--output_dir", str(output)]
    environment = {**evaluate_math.os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = output / "records" / "tiny_policy" / "arithmetic.part-0.jsonl"
    give_up = time.monotonic() + 120
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 16) and time.monotonic() < give_up:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    begun = part.read_bytes()
    assert 16 <= begun.count(b"\n") < 48 * 4
    part.write_bytes(begun + b'{"problem": "torn')

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    run_ranks([[*launcher, *ONE_DATASET, "--output_dir", str(output)]], {"ACCELERATE_USE_CPU": "true"})
    assert files(output) == files(tmp_path / "one")
    assert not list(output.rglob("*.part-*"))
    continued = json.loads((output / "summary.json").read_text())
    assert continued["models"] == summary["models"]
    assert continued["processes"] == 2
    assert 0.2 < summary["models"]["tiny_policy"]["arithmetic"]["pass@1"]["mean"] < 0.7


@pytest.fixture
def math_file(tmp_path):
    """Sums in MATH's columns, a third of them of level 1; one subject is one category too few for a table."""
    path = tmp_path / "math.jsonl"
    rows = enumerate(load_arithmetic("train", 12))
    path.write_text(
        "".join(
            json.dumps({"problem": row["problem"], "answer": row["answer"], "level": f"Level {1 + min(number % 3, 1)}",
                        "subject": "Prealgebra", "topic": f"topic {number}"}) + "\n"
            for number, row in rows
        )
    )  # fmt: skip
    return str(path)


def test_categories(tmp_path, chat_model_dir, math_file):
    arguments = ["--models", chat_model_dir, "--datasets", math_file, "--num_samples", 2, "--max_new_tokens", 4,
                 "--backend", "transformers", "--output_dir", tmp_path / "out"]  # fmt: skip
    summary = run(*arguments)
    (name,) = summary["models"]
    (levels,) = summary["categories"]["math"].values()
    assert {level: found["problems"] for level, found in levels.items()} == {"Level 1": 4, "Level 2": 8}
    for metric in ("length", "pass@1", "no-answer"):
        parts = [found["problems"] * found["models"][name][metric]["mean"] for found in levels.values()]
        assert sum(parts) / 12 == pytest.approx(summary["models"][name]["math"][metric]["mean"])
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"pass@1 (%) by level:\n\n| level | problems | {name} |" in table
    assert "12 problems, 2 samples each; temperature 0.6, top-p 1, max_new_tokens 4. 95 % intervals" in table
    assert "by subject" not in table

    again = run(*arguments, "--category_columns", "subject", "topic")  # of the same records
    assert list(again["categories"]["math"]) == ["subject", "topic"]
    assert again["models"] == summary["models"]
    with pytest.raises(ValueError, match="--category_columns must name columns of a dataset, and none has difficulty"):
        run(*arguments, "--category_columns", "level", "difficulty")


@pytest.mark.slow
def test_records_of_an_earlier_version_are_read_and_continued(tmp_path, chat_model_dir, math_file):
    """Without `verdict`, and with the last problems still to be sampled."""
    arguments = ["--models", chat_model_dir, "--datasets", math_file, "--num_samples", 2, "--max_new_tokens", 4,
                 "--batch_size", 2, "--backend", "transformers", "--output_dir", tmp_path / "out"]  # fmt: skip
    summary = run(*arguments)
    (path,) = (tmp_path / "out" / "records").rglob("*.jsonl")
    complete = read_records(path)
    assert {record.pop("verdict") for record in complete} <= {"no answer", "wrong"}
    path.write_text("".join(json.dumps(record) + "\n" for record in complete[:-6]))
    continued = run(*arguments)
    assert continued["models"] == summary["models"]
    records = read_records(path)
    assert ["verdict" in record for record in records] == [False] * 18 + [True] * 6
    assert [record["token_ids"] for record in records] == [record["token_ids"] for record in complete]


def test_cut_off_completions_and_those_without_an_answer_are_reported(tmp_path, chat_model_dir, gsm8k, capsys):
    arguments = ["--models", chat_model_dir, "--datasets", gsm8k, "--num_problems", 4, "--num_samples", 2,
                 "--backend", "transformers"]  # fmt: skip
    cut = run(*arguments, "--max_new_tokens", 2, "--output_dir", tmp_path / "cut")
    printed, table = capsys.readouterr().out, (tmp_path / "cut" / "table.md").read_text()
    (warning,) = cut["warnings"]
    assert "of the completions reached max_new_tokens=2 and were cut off" in warning
    assert f"**Warning:** {warning}" in table
    assert printed.index("warning: gsm8k, a batch of 8: ") < printed.index("measuring"), "while it samples"
    assert printed.count("reached max_new_tokens=2") == 2

    (examples,) = (tasks["gsm8k"] for tasks in cut["examples_without_answer"].values())
    assert len(examples) == 3
    for example in examples:
        assert f"problem {example['problem']}, sample {example['sample']}, " in table
    (path,) = (tmp_path / "cut" / "records").rglob("*.jsonl")
    texts = {(record["problem"], record["sample"]): record["completion"] for record in read_records(path)}
    assert all(example["end"] == texts[example["problem"], example["sample"]] for example in examples)


def test_the_longest_completion_by_default_fits_the_context(tmp_path, gsm8k, capsys):
    model, tokenizer = tiny_model(max_position_embeddings=300), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    arguments = ["--models", tmp_path / "short", "--datasets", gsm8k, "--num_problems", 2, "--num_samples", 1,
                 "--backend", "transformers"]  # fmt: skip
    prompts = load_problems(gsm8k, "train", instruction=evaluate_math.EvaluationArguments.instruction)["prompt"][:2]
    longest = max(len(tokenize_prompt(tokenizer, prompt)) for prompt in prompts)
    chosen = 300 - longest
    assert 0 < chosen < 300
    summary = run(*arguments, "--output_dir", tmp_path / "out")
    assert summary["arguments"]["max_new_tokens"] == chosen
    assert f"max_new_tokens={chosen}, the default: the context of" in capsys.readouterr().out
    records = read_records(next((tmp_path / "out" / "records").rglob("*.jsonl")))
    assert max(len(record["token_ids"]) for record in records) <= chosen
    with pytest.raises(ValueError, match="A prompt must leave tokens for the completion: the context of"):
        run(*arguments, "--output_dir", tmp_path / "full", "--system_prompt", "a " * 300)


@pytest.mark.slow
def test_summary_table_and_plots(tmp_path, chat_model_dir, gsm8k):
    output = tmp_path / "out"
    other = tmp_path / "other"
    tiny_model(seed=3).save_pretrained(other)
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(other)
    arguments = ["--models", chat_model_dir, other, "--base_model", chat_model_dir, "--datasets", gsm8k, "arithmetic",
                 "--num_problems", 4, "--num_samples", 2, 3, "--max_new_tokens", 6, "--backend", "transformers",
                 "--output_dir", output]  # fmt: skip
    summary = run(*arguments)
    assert summary == json.loads((output / "summary.json").read_text())
    first, second = summary["models"].values()
    assert summary["problems"] == {"gsm8k": 4, "arithmetic": 4}
    assert {"pass@1", "pass@2", "maj@2", "self-bleu", "rep-5", "entropy", "kl_plain", "length"} <= first["gsm8k"].keys()
    assert "maj@3" in first["arithmetic"]
    assert first["gsm8k"]["kl_plain"]["mean"] == pytest.approx(0, abs=1e-6)
    assert second["gsm8k"]["kl_plain"]["mean"] > 0.1
    (difference,) = next(value for name, value in summary.items() if name.startswith("difference_to_")).values()
    for name, estimate in difference["gsm8k"].items():
        expected = second["gsm8k"][name]["mean"] - first["gsm8k"][name]["mean"]
        assert estimate["mean"] == pytest.approx(expected), name
    table = (output / "table.md").read_text()
    assert table.count("| model |") == 4
    assert "## gsm8k" in table
    assert (output / "pass_at_k.png").stat().st_size > 10_000
    assert (output / "metrics.png").stat().st_size > 10_000
    assert not (output / "steps.png").exists()

    sampled = files(output)
    run(*arguments)  # nothing is left to do, and nothing changes
    assert files(output) == sampled
    with pytest.raises(ValueError, match=r"must be continued with the settings .* changed: seed"):
        run(*arguments, "--seed", 1)


@pytest.mark.slow
def test_the_last_checkpoints_are_averaged_and_adapters_are_merged(tmp_path, chat_model_dir, gsm8k):
    training = tmp_path / "run"
    torch.manual_seed(0)
    for step in (5, 10, 20):
        adapter = get_peft_model(
            type(tiny_model()).from_pretrained(chat_model_dir), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        )
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapter.save_pretrained(training / f"checkpoint-{step}")
    common = ("--models", training, "--base_model", chat_model_dir, "--datasets", gsm8k, "--num_problems", 3,
              "--num_samples", 2, "--max_new_tokens", 5, "--backend", "transformers")  # fmt: skip
    with pytest.raises(ValueError, match=r"holds neither\. It holds 3 checkpoints"):
        run(*common, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match=r"must be at most 3, .* got 5"):
        run(*common, "--output_dir", tmp_path / "out", "--last_checkpoints", 5)
    summary = run(*common, "--output_dir", tmp_path / "out", "--last_checkpoints", 2)
    (method,) = summary["models"]
    each = summary["checkpoints"][method]
    assert [name.rsplit("-", 1)[1] for name in each] == ["10", "20"]
    for name, estimate in summary["models"][method]["gsm8k"].items():
        assert estimate["mean"] == pytest.approx(sum(one["gsm8k"][name]["mean"] for one in each.values()) / 2), name
    assert all(one["gsm8k"]["kl_plain"]["mean"] != 0 for one in each.values())
    assert (tmp_path / "out" / "steps.png").stat().st_size > 10_000


def test_a_difficulty_filter_from_an_evaluation(tmp_path, gsm8k, capsys):
    """The documented pair of commands, on sums in GSM8K's columns."""
    run("--models", POLICY, "--datasets", gsm8k, "--num_samples", 4, "--max_new_tokens", 40, "--temperature", 1,
        "--instruction", "", "--backend", "transformers", "--output_dir", tmp_path / "rates")  # fmt: skip
    (records,) = (tmp_path / "rates" / "records").rglob("*.jsonl")
    rates = pass_rates(read_records(records))
    trained_on = sum(0 < rate < 1 for rate in rates.values())
    assert 4 <= trained_on < len(rates) == 24
    train_math.main([
        "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_completion_length", "8", "--num_generations", "2",
        "--per_device_train_batch_size", "4", "--max_steps", "1", "--model_name_or_path", POLICY, "--instruction", "",
        "--dataset_name", gsm8k, "--pass_rates", str(records), "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert f"{trained_on} problems to train on" in capsys.readouterr().out


def test_other_arguments_change_the_quickstart(tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(evaluate_math, "load_inputs", lambda args, state: loaded.append(args) or sys.exit(0))
    with pytest.raises(SystemExit):
        run("--num_problems", 2, "--output_dir", tmp_path)
    assert (loaded[0].datasets, loaded[0].num_problems, loaded[0].output_dir) == (["arithmetic"], 2, str(tmp_path))
    assert "this is the quickstart" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--models"):
        run("--base_model", "m", "--output_dir", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "--temperature must be above 0, got 0"),
        (["--backend", "tgi"], "--backend must be one of auto, vllm, transformers, got 'tgi'"),
        (["--num_samples", "1", "2"], r"or one for each, at least 1, got \[1, 2\]"),
        (["--models", "tiny_policy", "tiny_policy"], "--models must differ"),
        (["--num_problems", "0"], "--num_problems must be at least 1, got 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--datasets", "a:b:c:d"], "must be given as NAME, NAME:SPLIT or NAME:SPLIT:CONFIG, got 'a:b:c:d'"),
    ],
)
def test_mistakes_are_named_before_a_model_loads(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("--models", "tiny_policy", "--datasets", "arithmetic", "--output_dir", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["records.jsonl", "aime[2024].jsonl"])  # a pattern is a name like any other
def test_records_files(tmp_path, name):
    path = tmp_path / name
    one, two, three = ({"problem": problem, "sample": sample} for problem, sample in (("é", 0), ("é", 1), ("a", 0)))
    append_records(part_path(path, 1), [two])
    append_records(part_path(path, 0), [three])
    with part_path(path, 0).open("a") as file:
        file.write('{"problem": "torn')
    assert read_parts(path) == [three, two]
    append_records(part_path(path, 0), [one, two])  # an overlap with what another process has done
    assert merge_parts(path, ["é", "a"]) == [one, two, three] == read_records(path)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert merge_parts(path, ["é", "a"]) == [one, two, three]
    path.write_text('{"problem": "a"}\nnot json\n')
    with pytest.raises(ValueError, match="line 2 is not"):
        read_records(path)


@pytest.mark.parametrize(
    ("files", "base"),
    [
        ({"adapter_config.json"}, "org/base"),
        ({"config.json"}, "org/model"),
        ({"config.json", "adapter_config.json"}, "org/model"),
        (set(), "org/model"),
        (None, "org/model"),
    ],
)
def test_an_adapter_on_the_hub_has_a_base(monkeypatch, files, base):
    def cached(name, file, **options):
        if files is None:
            raise OSError(f"{name} is not there")
        return f"/cache/{file}" if file in files else None

    monkeypatch.setattr(policies, "cached_file", cached)
    monkeypatch.setattr(
        policies.PeftConfig, "from_pretrained", lambda name: LoraConfig(base_model_name_or_path="org/base")
    )
    (found,) = policies.find_checkpoints("org/model", last=0)
    assert (found.path, found.base, found.is_adapter) == ("org/model", base, base != "org/model")


def test_an_engines_longest_sequence_is_the_longest_prompt_and_completion(tmp_path, monkeypatch, chat_model_dir):
    """Not the model's full context, for which a small GPU may not have the memory."""
    built = []
    monkeypatch.setattr(evaluate_math, "use_vllm", lambda args: True)
    module = ModuleType("opo_trl.evaluation.vllm_sampling")
    module.VllmSampler = lambda *args, **options: built.append(options)
    monkeypatch.setitem(sys.modules, "opo_trl.evaluation.vllm_sampling", module)
    args = SimpleNamespace(max_new_tokens=7, temperature=1.0, dtype="float32")
    prompts = ["1+1", "a longer question"]
    tasks = [
        SimpleNamespace(problems=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}]]}))
        for text in prompts
    ]
    (checkpoint,) = policies.find_checkpoints(str(chat_model_dir), last=0)
    for context, expected in ((None, None), (25, 25)):
        policy = evaluate_math.Policy(checkpoint, args, torch.device("cpu"), tasks)
        longest = max(len(tokenize_prompt(policy.tokenizer, task.problems["prompt"][0])) for task in tasks)
        if context is not None:
            monkeypatch.setattr(evaluate_math.Policy, "context", context)
        _ = policy.sampler
        assert built[-1]["max_model_len"] == (expected or longest + 7)


@pytest.mark.slow
def test_a_difficulty_filter_on_gsm8k(tmp_path, shared_data, capsys):
    """The documented pair on GSM8K's own rows, by a model taught to guess: it is right now and then."""
    torch.manual_seed(0)
    rows = load_problems(str(shared_data / "gsm8k_train.jsonl"), "train", instruction="Guess.")
    model, tokenizer = tiny_model(max_position_embeddings=2_048), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    with torch.no_grad():  # the usual scale of initial weights, which learns faster
        for parameter in model.parameters():
            parameter.mul_(0.1 if parameter.ndim == 2 else 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        batch = rows.select(range(16 * step, 16 * step + 16))
        prompts = [tokenize_prompt(tokenizer, prompt) for prompt in batch["prompt"]]
        guesses = [[*tokenizer(f"\\boxed{{{answer}}}")["input_ids"], 1] for answer in batch["solution"]]
        width = max(len(prompt) + len(guess) for prompt, guess in zip(prompts, guesses, strict=True))
        input_ids, labels = torch.zeros(16, width, dtype=torch.long), torch.full((16, width), -100)
        for i, (prompt, guess) in enumerate(zip(prompts, guesses, strict=True)):
            input_ids[i, : len(prompt) + len(guess)] = torch.tensor(prompt + guess)
            labels[i, len(prompt) : len(prompt) + len(guess)] = torch.tensor(guess)
        model(input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "guesser")
    tokenizer.save_pretrained(tmp_path / "guesser")

    dataset = str(shared_data / "gsm8k_train.jsonl")
    run("--models", tmp_path / "guesser", "--datasets", dataset, "--num_problems", 256, "--num_samples", 8,
        "--max_new_tokens", 16, "--temperature", 1, "--instruction", "Guess.", "--backend", "transformers",
        "--output_dir", tmp_path / "rates")  # fmt: skip
    (records,) = (tmp_path / "rates" / "records").rglob("*.jsonl")
    trained_on = sum(0 < rate < 1 for rate in pass_rates(read_records(records)).values())
    assert trained_on >= 16
    train_math.main([
        "--use_cpu", "--bf16", "false", "--report_to", "none", "--max_completion_length", "16", "--num_generations",
        "4", "--per_device_train_batch_size", "8", "--max_steps", "2",
        "--model_name_or_path", str(tmp_path / "guesser"), "--instruction", "Guess.",
        "--dataset_name", dataset, "--pass_rates", str(records), "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert f"{trained_on} problems to train on" in capsys.readouterr().out
