"""The figures in README and docs are those that the benchmarks wrote to `benchmarks/results`."""

import importlib.util
import json
import re
import statistics

import pytest

from measuring import interval as mean_interval
from opo_report import page_tables as opo_tables
from opo_trl.scripts.reporting import COLUMNS
from pages import PAGES, ROOT, page, tables, the_table
from planning import page_sentence as planning_sentence
from planning import page_table as planning_table
from row_traffic import count as count_traffic
from row_traffic import page_sentence as traffic_sentence
from row_traffic import page_table as traffic_table
from stability_report import page_tables as stability_tables
from streaming import hidden_by_round
from streaming import table as streaming_table
from streaming_simulation import page_table as simulation_table
from time_report import faster_grpo, final_table
from time_report import page_tables as time_tables
from variance_report import length_tables
from variance_report import page_tables as variance_tables

README = (ROOT / "README.md").read_text()


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def key(case):
    return case["case"].replace("=0.0/", "=0/")


def with_interval(estimate):
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


def check_tables(tables_of_page, text):
    for name, table in tables_of_page.items():
        assert table in text, name


def at_equal_scale(policy):
    """Variance of each baseline relative to the group mean's, K = 8."""
    return {name: found["over_group_mean_at_equal_scale"] for name, found in policy["group_sizes"]["8"].items()}


def update_row(case):
    lengths, uninformative, rows, *sampler = case["case"].split("/")
    lengths = {"lognormal": "log-normal", "tiny_policy": "tiny policy"}.get(lengths, lengths)
    low, high = case["speedup_range"]
    return [
        f"{lengths}, with sampler" if sampler else lengths,
        f"{float(uninformative.removeprefix('uninformative=')):.0%}".replace("%", " %"),
        rows.removeprefix("micro-batch="),
        f"{case['speedup']:.2f}x ({low:.1f} to {high:.1f})",
        f"{case['memory_ratio']:.2f}x",
        f"{case['token_efficiency']:.3f} ({case['trl_token_efficiency']:.2f})",
        f"{case['rows_forward']:.0f} ({case['trl_rows_forward']:.0f})",
    ]


def test_the_update():
    """A case that was also measured with more rounds has that result, as everywhere else."""
    longer = {key(case): case for case in results("update_phase-quick")["cases"]}
    expected = [update_row(longer.get(key(case), case)) for case in results("update_phase")["cases"]]
    assert the_table(page("update"), "lengths") == expected


def test_the_updates_headlines():
    half, none, constant = results("update_phase-quick")["cases"]
    speedups = [f"{case['speedup']:.2f}x" for case in (half, none, constant)]
    memory = [f"{case['memory_ratio']:.2f}x" for case in (half, none, constant)]
    text = " ".join(page("update").split())
    assert (
        f"half of the groups uninformative {speedups[0]}, with none {speedups[1]}, constant lengths {speedups[2]}; "
        f"memory {memory[0]}, {memory[1]} and {memory[2]}"
    ) in text
    readme = the_table(README, "half of the groups uninformative")
    assert [(row[0], row[1]) for row in readme] == [
        ("yes", f"{half['speedup']:.1f}x"),
        ("no", f"{none['speedup']:.1f}x"),
    ]
    assert f"{half['memory_ratio']:.0%} and {none['memory_ratio']:.0%}".replace("%", " %") in " ".join(README.split())
    worst = max(case["gradient_error"] for case in results("update_phase")["cases"])
    assert f"Gradients differ by at most {worst:.0e}".replace("e-0", "e-") in text


def test_a_ratio_is_the_same_number_on_every_page():
    """`5.5x` means the update against TRL's; most pages have only the ratios of README's table and top."""
    ratios = re.compile(r"\b\d+\.\d+x\b")
    claims = {
        ratio for row in the_table(README, "half of the groups uninformative") for ratio in ratios.findall(str(row))
    }
    assert len(claims) > 4
    claims |= set(other_lengths())
    for path in PAGES:
        if path.stem not in ("update", "streaming", "stability"):  # those have ratios of their own
            assert set(ratios.findall(path.read_text())) <= claims, path.name


def other_lengths():
    """Speed-up on the tiny policy's lengths, half of the groups uninformative and none, and on equal lengths, none."""
    speedups = {key(case): case["speedup"] for case in results("update_phase")["cases"]}
    speedups |= {key(case): case["speedup"] for case in results("update_phase-quick")["cases"]}
    cases = ("tiny_policy/uninformative=0.5", "tiny_policy/uninformative=0", "constant/uninformative=0")
    return [f"{speedups[f'{case}/micro-batch=8']:.1f}x" for case in cases]


def test_home_repeats_readme():
    """The same reasons, and the same first script."""

    def plain(text, start, end):
        return re.sub(r"\(([^()]*)\)", "", " ".join(text.split()).split(start)[1].split(end)[0]).strip()

    home = page("index")
    reasons = [plain(text, "## Why OPO, and when", "## ") for text in (README, home)]
    assert reasons[0] == reasons[1]
    half, none, _ = results("update_phase-quick")["cases"]
    assert f"{half['speedup']:.1f}x faster where half of the groups are uninformative" in README.replace("\n", " ")
    assert f"{none['speedup']:.1f}x with none" in README.replace("\n", " ")
    tiny_half, tiny_none, equal = other_lengths()
    sentence = f"it is {tiny_half} and {tiny_none}, and for equal lengths without an uninformative group {equal}."
    assert sentence in README.replace("\n", " ")
    assert README.split("```python")[1].split("```")[0] == home.split("```python")[1].split("```")[0]
    advice = [plain(text, "`OPOConfig(output_dir=...)`", "your own data and reward") for text in (README, home)]
    assert advice[0] == advice[1]
    assert f"300 x 64 x 512 = {300 * 64 * 512 / 1e6:.1f} million tokens" in home.replace("\n", " ")


def test_the_recipe_on_a_cpu():
    seconds = results("quickstart")["seconds"]
    text = " ".join(page("install").split())
    assert f"in {seconds / 60:.1f} minutes on two cores ({seconds:.0f} s," in text


WITHOUT_LM_HEAD = ROOT / "benchmarks" / "results" / "update_phase-lm-head-none-quick.json"


def test_the_update_without_the_lm_head():
    half, none, constant = (f"{case['speedup']:.2f}x" for case in results(WITHOUT_LM_HEAD.stem)["cases"])
    sentence = f"half of the groups uninformative {half}, with none {none}, constant lengths {constant}"
    assert f"without the LM head on either side: log-normal lengths with {sentence}" in " ".join(page("update").split())


def test_the_planning():
    measured = results("planning")
    assert the_table(page("update"), "rows on a rank") == tables(planning_table(measured) + "\n")[0][1:]
    assert planning_sentence(measured) in " ".join(page("update").split())
    assert measured["draws"]["largest_of_limit"] <= 1
    assert max(plan["after"]["largest_of_limit"] for plan in measured["plans"]) <= 1


def test_what_assigning_rows_moves():
    measured = results("rank_balance")
    assert the_table(page("update"), "ranks x rows") == tables(traffic_table(measured) + "\n")[0][1:]
    assert traffic_sentence(measured) in " ".join(page("update").split())
    for counted in measured["counted"][:3]:
        assert count_traffic(counted["ranks"], counted["rows"]) == counted, "counted anew by the code that is here"


@pytest.mark.slow
def test_the_simulated_ranks():
    spec = importlib.util.spec_from_file_location("rank_balance", ROOT / "benchmarks" / "rank_balance.py")
    rank_balance = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rank_balance)

    def speedups(case, uninformative=0.5):
        ranks, rows, micro_batches = (int(word) for word in case.replace(" x ", ", ").split(", "))
        found = rank_balance.simulate(ranks, rows, micro_batches, uninformative)
        return [found[f"{plan}, {engine}"] for engine in ("DDP", "ZeRO-3") for plan in ("own rows", "assigned")]

    for case, *cells in the_table(page("update"), "ranks x rows, micro-batches"):
        assert cells == [f"{value:.2f}x" for value in speedups(case)], case
    eight = [[f"{value:.1f}x" for value in speedups("8 x 64, 8", uninformative)] for uninformative in (0.5, 0.0)]
    readme = the_table(README, "half of the groups uninformative")
    assert [row[2] for row in readme] == [
        f"{assigned} (DDP), {sharded} (ZeRO-3, FSDP)" for _, assigned, _, sharded in eight
    ]
    shares, efficiencies = next(table for table in tables(page("update")) if table[0][0].startswith("share of TRL's"))
    assert efficiencies[1:] == [f"{rank_balance.token_efficiency(float(share)):.3f}" for share in shares[1:]]


def test_the_reward():
    measured = results("reward_throughput")
    names = {
        "math_verify_reward": "`math_verify_reward`",
        "TRL accuracy_reward": "TRL's `accuracy_reward`",
        "TRL accuracy_reward, boxed solutions": "the same, solutions boxed",
        "verify(parse, parse)": "`verify(parse(solution), parse(completion))`",
        "verify(parse, parse), boxed solutions": "the same, solutions boxed",
    }
    rows = the_table(page("reward"), "reward")
    assert len(rows) == len(measured["rewards"])
    for row, reward in zip(rows, measured["rewards"], strict=True):
        low, high = reward["range"]
        assert row[:2] == [names[reward["reward"]], f"{reward['seconds']:.2f} s ({low:.2f} to {high:.2f})"]
        for cell, name in zip(row[2:], ("false positives", "false negatives", "unscored"), strict=True):
            digits = len(cell.removesuffix(" %").partition(".")[2])
            assert cell == f"{100 * reward[name]:.{digits}f} %", (reward["reward"], name)
    text = " ".join(page("reward").split())
    ours, trls, *_ = (reward["seconds"] for reward in measured["rewards"])
    assert f"2,048 completions take {ours:.1f} s" in " ".join(README.split())
    assert f"{trls:.1f} s with TRL's `accuracy_reward`" in " ".join(README.split())
    assert f"takes {measured['broken batch']['seconds']:.1f} s" in text
    copied = measured["problems rewarded for a copied formula"]
    assert f"{copied['the same without prompts']:.1%}".replace("%", " % would reward") in text
    assert f"boxed solutions: {copied['TRL accuracy_reward']:.1%}".replace("%", " %") in text
    assert f"it is {copied['math_verify_reward']:.1%}".replace("%", " %") in text


def test_the_engines():
    measured = results("engine_equality")["rows"]
    names = {"data parallel": "ddp", "FSDP2": "fsdp2", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
    heading, *rows = next(table for table in tables(page("engines")) if table[0][0] == "engine")
    assert [names[row[0]] for row in rows] == list(measured)
    for row in rows:
        for column, cell in zip(heading[1:], row[1:], strict=True):
            value = measured[names[row[0]]][column]
            assert cell == (value if isinstance(value, str) else f"{value:.0e}" if value else "0"), (row[0], column)
    worst = max(value for row in measured.values() for value in row.values() if not isinstance(value, str))
    assert f"differ by {worst:.0e}".replace("e-0", "e-") in " ".join(README.split())


def interval(estimate, scale, digits, signed=False):
    sign = "+" if signed else ""
    mean, low, high = (f"{scale * estimate[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


EVALUATION_ROWS = {  # row of the table -> metric, factor, digits
    "pass@1 (%)": ("pass@1", 100, 1),
    "pass@2 (%)": ("pass@2", 100, 1),
    "pass@4 (%)": ("pass@4", 100, 1),
    "pass@8 (%)": ("pass@8", 100, 1),
    "maj@8 (%)": ("maj@8", 100, 1),
    "no answer (%)": ("no-answer", 100, 1),
    "length (tokens)": ("length", 1, 1),
    "Self-BLEU (%)": ("self-bleu", 100, 1),
    "Distinct-2 (%)": ("distinct-2", 100, 1),
    "entropy (nats per token)": ("entropy", 1, 3),
    "KL (plain) (nats per token)": ("kl_plain", 1, 3),
    "KL (low variance) (nats per token)": ("kl_low_variance", 1, 3),
}


def evaluation_rows():
    measured = results("evaluation")
    before, after = (measured["models"][name]["arithmetic"] for name in ("tiny_policy", "quickstart"))
    difference = measured["difference_to_tiny_policy"]["quickstart"]["arithmetic"]
    return [
        [
            row,
            interval(before[metric], scale, digits),
            interval(after[metric], scale, digits),
            interval(difference[metric], scale, digits, signed=True),
        ]
        for row, (metric, scale, digits) in EVALUATION_ROWS.items()
    ]


def test_the_evaluation():
    rows = evaluation_rows()
    assert tables(page("evaluation"))[0] == [["", "before", "after", "difference"], *rows]
    before_and_after = {row[0]: f"from {row[1].split()[0]} to {row[2].split()[0]} %" for row in rows}
    text = " ".join(README.split())
    assert f"pass@1 goes {before_and_after['pass@1 (%)']}, pass@8 {before_and_after['pass@8 (%)']}" in text


def test_the_tutorial():
    measured = results("quickstart")
    expected = [
        [
            f"pass@1 {when}",
            f"{measured[f'pass@1_{when}']:.3f}",
            "{:.3f} to {:.3f}".format(*measured[f"pass@1_{when}_interval"]),
            f"{measured[f'mean_length_{when}']:.1f}",
        ]
        for when in ("before", "after")
    ]
    assert the_table(page("tutorial"), "of 512 held-out problems") == expected
    assert f"seed {measured['seed']}" in page("tutorial")


def test_what_the_tutorial_prints():
    logged = results("quickstart_log")
    (printed,) = re.findall(r"^ +step +reward.*?^pass@1 after", page("tutorial"), re.MULTILINE | re.DOTALL)
    lines = [line.split() for line in printed.splitlines()[1:-1]]
    assert len(lines) > 5
    for step, *cells in lines:
        number = int(step.split("/")[0])
        if cells[0] == "held-out":
            (value,) = [entry["eval_reward"] for entry in logged if "eval_reward" in entry and entry["step"] == number]
            assert cells[-1] == f"{value:.3f}"
        else:
            (entry,) = [entry for entry in logged if "reward" in entry and entry["step"] == number]
            assert cells[:-1] == [f"{entry[name]:.4g}" for name in COLUMNS], step


def test_what_the_quickstart_logs():
    steps = [entry for entry in results("quickstart_log") if "reward" in entry]
    rows = {row[0].strip("`"): row[-1] for table in tables(page("metrics")) for row in table}
    quoted = 0
    for metric, healthy in rows.items():
        for kind, pattern in ((0, r"Quickstart: ([\d.]+) to (\d[\d.]*\d)"), (1, r"between ([\d.]+) and (\d[\d.]*\d)")):
            if found := re.search(pattern, healthy):
                values = [entry[metric] for entry in steps]
                first, last = (min(values), max(values)) if kind else (values[0], values[-1])
                digits = [len(text.partition(".")[2]) for text in found.groups()]
                assert list(found.groups()) == [f"{first:.{digits[0]}f}", f"{last:.{digits[1]}f}"], metric
                quoted += 1
    assert quoted == 8


def test_the_variance():
    measured = results("gradient_variance")["policies"]
    text = page("variance")
    check_tables(variance_tables(measured), text)
    text = " ".join(text.split())
    sizes = measured["fresh"]["group_sizes"].values()
    ratios = [found["OPO"]["over_group_mean_at_equal_scale"]["value"] for found in sizes]
    assert f"at equal scale is {min(ratios):.1f} to {max(ratios):.1f} times the plain mean's" in text

    none = [at_equal_scale(policy)["none"]["value"] for policy in measured.values()]
    assert f"at all has {min(none):.2f} to {max(none):.2f} times the mean's variance (K = 8)" in text


def test_the_pretrained_model():
    measured = results("gradient_variance-smollm2")
    text = page("real_model")
    every = variance_tables(measured["policies"]) | length_tables(measured["policies"])
    check_tables({name: every[name] for name in every.keys() - {"norms", "weights", "variances"}}, text)
    (model,), settings, words = measured["policies"].values(), measured["settings"], " ".join(text.split())
    assert (
        f"{settings['prompts']} problems with {settings['samples']} completions of each is {model['pass@1']:.2f}"
        in words
    )
    ratios, length = at_equal_scale(model), model["within_groups"]["lengths"]
    assert f"to the power {with_interval(length['log_log_slope'])}" in words
    assert f"correlation is {length['correlation']['value']:.2f}" in words
    assert f"OPO's variance is {with_interval(ratios['OPO'])} times the plain mean's" in words
    assert f"uncertainty of the tokens is at {with_interval(ratios['uncertainty'])}" in words
    assert f"the exact norms are at {with_interval(ratios['exact'])}" in words
    assert f"no baseline at all is at {with_interval(ratios['none'])}" in words
    assert f"{model['sampler']['redrawn']} of {model['sampler']['tokens']:,} differ" in words


def test_the_learning_curve_of_the_pretrained_model():
    measured, text = results("smollm2_evaluation"), page("real_model")
    before, after = (measured["models"][name]["test"] for name in ("smollm2", "smollm2-opo"))
    difference = measured["difference_to_smollm2"]["smollm2-opo"]["test"]
    shown = {**EVALUATION_ROWS, "truncated (%)": ("truncated", 100, 1)}
    table = the_table(text, "of 64 held-out problems")
    assert len(table) == 7
    for row, *cells in table:
        metric, scale, digits = shown[row]
        assert cells == [
            interval(before[metric], scale, digits),
            interval(after[metric], scale, digits),
            interval(difference[metric], scale, digits, signed=True),
        ], row
    arguments = measured["arguments"]
    assert measured["problems"] == {"test": 64}
    assert (arguments["num_samples"], arguments["temperature"], arguments["max_new_tokens"]) == ([8], 1.0, 64)
    rewards = [entry["reward"] for entry in results("smollm2_training_log") if "reward" in entry]
    assert len(rewards) == 40
    first, last = (sum(part) / 5 for part in (rewards[:5], rewards[-5:]))
    words = " ".join(text.split())
    assert f"is {first:.2f} in the first five steps and {last:.2f} in the last five" in words
    rise = interval(difference["pass@1"], 100, 0, signed=True).replace("(", "(95 % interval ")
    assert f"raises pass@1 by {rise.removesuffix(')')}) points" in words
    answered = [found["pass@1"]["mean"] / (1 - found["no-answer"]["mean"]) for found in (before, after)]
    assert "with an answer, {:.0%} are right before and {:.0%} after".format(*answered).replace("%", " %") in words
    scores = "from {:.1f} to {:.1f} %".format(*(100 * found["pass@1"]["mean"] for found in (before, after)))
    assert f"pass@1 of SmolLM2-135M on word problems {scores}" in " ".join(README.split())


def test_readmes_baseline_weights():
    """Each row has the variance, at equal scale, with the weight that it advises."""

    def ratio(task, baseline):
        first = next(iter(results(f"gradient_variance{task}")["policies"].values()))
        return with_interval(at_equal_scale(first)[baseline])

    rows = [row[2] for row in the_table(README, "your policy")]
    assert f"OPO's variance is {ratio('-smollm2', 'OPO')} times the mean's" in rows[0]
    assert rows[1].startswith(f"{ratio('-smollm2', 'uncertainty')}; the exact norms give {ratio('-smollm2', 'exact')}")
    for row, task in zip(rows[2:], ("-long_chains", ""), strict=True):
        assert f"{ratio(task, 'uncertainty')}; with the length {ratio(task, 'OPO')}" in row
    model = next(iter(results("gradient_variance-smollm2")["policies"].values()))
    exponent = model["within_groups"]["lengths"]["log_log_slope"]["value"]
    assert f"grows with the length to the power {exponent:.2f}" in rows[0]
    ahead = at_equal_scale(model)["OPO"]["value"]
    assert f"gradient is {ahead:.2f} times that of the plain mean" in " ".join(README.split())


def test_the_long_chains():
    measured = results("gradient_variance-long_chains")
    text = page("long_chains")
    of_variance = variance_tables(measured["policies"])
    check_tables(length_tables(measured["policies"]) | {k: of_variance[k] for k in ("OPO", "baselines")}, text)
    settings, policies, words = measured["settings"], measured["policies"], " ".join(text.split())
    fresh, half, trained = policies.values()
    assert f"{settings['prompts']} held-out problems with {settings['samples']} completions of each" in words
    assert f"from pass@1 {fresh['pass@1']:.2f} to {trained['pass@1']:.2f}" in words
    assert f"and have {half['pass@1']:.2f} and {trained['pass@1']:.2f}" in words
    ratios, length = at_equal_scale(fresh), fresh["within_groups"]["lengths"]
    assert f"to the power {with_interval(length['log_log_slope'])}, as the paper assumes" in words
    assert f"correlation within groups is {length['correlation']['value']:.2f}" in words
    assert f"the power is {trained['within_groups']['lengths']['log_log_slope']['value']:.2f}" in words
    assert f"OPO's variance is {with_interval(ratios['OPO'])} times the plain mean's at equal scale (K = 8)" in words
    assert f"uncertainty of the tokens is at {with_interval(ratios['uncertainty'])}" in words
    assert f"the exact norms would be at {ratios['exact']['value']:.2f}" in words
    sampled = [policy["sampler"] for policy in policies.values()]
    redrawn, tokens = (sum(each[name] for each in sampled) for name in ("redrawn", "tokens"))
    assert f"{redrawn} of {tokens:,} differ" in words
    first = results("gradient_variance-long_chains-1500")["policies"]["fresh"]
    assert f"had a pass@1 of {first['pass@1']:.2f}" in words
    ratio = first["group_sizes"]["8"]["OPO"]["over_group_mean"]
    assert f"its power was {first['within_groups']['lengths']['log_log_slope']['value']:.2f}" in words
    assert f"OPO's variance {ratio['value']:.2f} times the mean's ({ratio['low']:.2f} to {ratio['high']:.2f})" in words


def test_the_stability_map():
    measured = results("stability_map")
    text = page("stability")
    check_tables(stability_tables(measured), text)
    words, rows = " ".join(text.split()), measured["rows"]
    bands = {name: row["band"] for name, row in rows.items()}
    widths = [f"{bands[name]['width']:.1f}" for name in ("opo-1", *(f"grpo-{steps}" for steps in (1, 2, 4, 8)))]
    opo, one, *more = widths
    assert f"over a factor of {opo}, GRPO with one step over {one}" in words
    assert "with 2, 4 and 8 steps over {}, {} and {}".format(*more) in words

    def rate(name, side):
        return f"{bands[name][side]:.1e}".replace("e-0", "e-")

    assert f"falls from {rate('grpo-1', 'high')} with one step to {rate('grpo-8', 'high')} with eight" in words
    fresh, stale = (f"{rate(name, 'low')} to {rate(name, 'high')}" for name in ("grpo_fresh-4", "grpo-4"))
    assert f"the band of GRPO with 4 steps: {fresh} against {stale}" in words
    assert f"{measured['runs']} runs, {measured['cpu_hours']:.0f} hours of CPU time" in words
    assert f"the starting policy's {measured['start']['entropy']:.3f}" in words
    lost = [
        (kl, entropy)
        for row in rows.values()
        for cell in row["cells"].values()
        for collapsed, kl, entropy in zip(cell["collapsed"], cell["kl_plain"], cell["entropy"], strict=True)
        if collapsed
    ]
    kls, entropies = zip(*lost, strict=True)
    assert f"a KL of {min(kls):.1f} to {max(kls):.0f} nats per token" in words
    assert min(entropies) < measured["start"]["entropy"] < max(entropies)


def test_the_time_to_an_accuracy():
    measured = results("time_to_accuracy")
    text = page("time_to_accuracy")
    check_tables({"final": final_table(measured), **time_tables(measured)}, text)
    words = " ".join(text.split())

    def ratio(share, variant, axis):
        variants = measured["targets"][share]["variants"]
        return variants[variant]["axes"][axis]["times_less_than"][faster_grpo(variants, axis)]

    opo = ratio("0.75", "opo", "seconds")
    assert f"GRPO takes {opo['mean']:.2f} times as many seconds as OPO to three quarters" in words
    assert f"(95 % interval {opo['low']:.2f} to {opo['high']:.2f})" in words
    for share, sentence in {
        "0.75": "with both, GRPO takes {:.2f} times as many seconds to three quarters, and {:.2f} times as many tokens",
        "0.9": "it takes {:.2f} times as many seconds, and {:.2f} times as many tokens",
    }.items():
        found = (ratio(share, "opo_both", axis)["mean"] for axis in ("seconds", "tokens"))
        assert sentence.format(*found) in words
    ends = {variant: 100 * sum(each) / len(each) for variant, each in measured["final"].items()}
    assert f"{ends['opo_both']:.1f} %, where OPO without them ends at {ends['opo']:.1f} %" in words
    assert f"and GRPO at {ends['grpo']:.1f} %" in words
    steps = [
        measured["targets"]["0.75"]["variants"][variant]["axes"]["steps"]["over_seeds"]["mean"]
        for variant in ("opo", "opo_both")
    ]
    assert "OPO takes {:.0f} steps, and {:.0f} with both".format(*steps) in words
    half = ratio("0.5", "opo", "seconds")
    assert (
        f"To half of it, it takes {half['mean']:.2f} times as many seconds ({half['low']:.2f} to {half['high']:.2f})"
        in words
    )
    brief = (
        f"To half of it, GRPO takes {half['mean']:.2f} times ({half['low']:.2f} to {half['high']:.2f}) as many seconds"
    )
    assert brief in " ".join(README.split())
    reached = measured["targets"]["0.9"]["variants"]["opo"]["reached"]
    assert f"is reached by {reached} of {len(measured['final']['opo'])} OPO runs" in words
    for other, sentence in {"opo": "difference {} points, {} to {}", "grpo": "{}, {} to {}: level"}.items():
        pairs = zip(measured["final"]["opo_both"], measured["final"][other], strict=True)
        ahead = mean_interval([100 * (one - another) for one, another in pairs])
        numbers = [f"{ahead[name]:+.1f}" for name in ("mean", "low", "high")]
        assert sentence.format(*numbers) in words
    assert "({} points, {} to {})".format(*numbers) in " ".join(README.split())
    in_readme = f"GRPO takes {opo['mean']:.1f}x ({opo['low']:.1f} to {opo['high']:.1f}) as many seconds as OPO"
    assert in_readme in " ".join(README.split())


def test_the_cost_of_a_draw():
    sizes = results("prompt_draw")["sizes"]
    least, most = (1000 * sizes[place]["cpu_seconds"] for place in (0, -1))
    assert (sizes[0]["prompts"], sizes[-1]["prompts"]) == (1_000, 1_000_000)
    words = " ".join(page("choosing_prompts").split())
    expected = f"{least:.1f} ms of CPU time with 1,000 prompts to choose from and {most:.0f} ms with a million"
    assert f"takes {expected}" in words


def test_streaming():
    measured = results("streaming")
    text = page("streaming")
    rounds = measured["settings"]["rounds"]
    assert streaming_table(measured["cases"], rounds) in text
    words = " ".join(text.split())
    hidden = [statistics.median(hidden_by_round(case, rounds)) for case in measured["cases"].values()]
    assert f"hides {min(hidden):.0%} to {max(hidden):.0%} of rewards and update".replace("%", " %") in words
    last = measured["cases"]["4 layers, lengths vary between prompts"]
    assert f"{last['streamed'] - last['streamed_generation']:.1f} s of a step follow the last completion" in words
    to_reward = measured["cases"]["4 layers, lengths vary between prompts"]["time_to_reward"]
    assert f"{to_reward['ratio']:.2f} times as long without streaming" in words


def test_opo_against_grpo():
    measured = results("opo_vs_grpo")
    text = page("opo_vs_grpo")
    check_tables(opo_tables(measured), text)
    rates, scores = the_table(README, "variant")
    for rate, cell, found in zip(rates[1:], scores[1:], measured["variants"].values(), strict=True):
        assert float(rate) == found["learning_rate"]
        assert cell == interval(found["over_seeds"]["pass@1"], 100, 1)
    sentences = {"3e-05": "level with OPO at 3e-5 ({})", "0.0001": "ahead of it at 1e-4 ({})"}
    for rate, sentence in sentences.items():
        difference = measured["baselines_at_equal_rates"][rate]["opo_mean"]["difference_to_opo"]["pass@1"]
        mean, low, high = (f"{100 * difference[name]:+.1f}" for name in ("mean", "low", "high"))
        assert sentence.format(f"{mean} points, {low} to {high}") in " ".join(README.split())


def test_opo_against_grpo_on_long_chains():
    measured = results("opo_vs_grpo-long_chains")
    text = page("opo_vs_grpo")
    check_tables(opo_tables(measured), text)
    words, variants = " ".join(text.split()), measured["variants"]
    runs = sum(len(found["sweep"]) * 2 + len(measured["settings"]["seeds"]) for found in variants.values())
    assert f"{runs} runs took {measured['cpu_hours']:.1f} hours of CPU time" in words
    differences = [found["difference_to_opo"]["pass@1"] for name, found in variants.items() if name != "opo"]
    assert all(each["low"] < 0 < each["high"] for each in differences), "no variant differs by more than its interval"
    ends = [f"{100 * end(each['mean'] for each in differences):+.1f}" for end in (min, max)]
    assert "differences of {} to {} points".format(*ends) in " ".join(README.split())
    halves = [100 * (each["high"] - each["low"]) / 2 for each in differences]
    assert f"{min(halves):.0f} to {max(halves):.0f} points wide to each side" in words
    lowest, *others = sorted(100 * score for score in variants["opo"]["each_seed"]["pass@1"])
    assert f"four end at {others[0]:.1f} to {others[-1]:.1f} %, one at {lowest:.1f} %" in words
    broken = [score for found in variants.values() for score in found["sweep"].get("0.003", [])]
    assert f"at most {100 * max(broken):.1f} % of its answers are right" in words
    weighed = variants["opo_uncertainty"]
    scores = sorted(100 * score for score in weighed["each_seed"]["pass@1"])
    assert f"seeds differ less ({scores[0]:.1f} to {scores[-1]:.1f} %)" in words
    kl, start = (found["over_seeds"]["kl_plain"]["mean"] for found in (weighed, variants["opo"]))
    assert f"(KL {kl:.3f} against {start:.3f})" in words
    alike, as_alike = (100 * found["over_seeds"]["self-bleu"]["mean"] for found in (weighed, variants["opo"]))
    assert f"(Self-BLEU {alike:.1f} against {as_alike:.1f} %)" in words
    below = variants["grpo_off_4"]["difference_to_opo"]["reward"]
    numbers = [f"{-100 * below[name]:.1f}" for name in ("mean", "high", "low")]
    assert "ends {} points below OPO's ({} to {})".format(*numbers) in words


def test_two_steps_without_an_entropy_bonus():
    rows = results("stability_map")["rows"]
    one, two = (rows[f"grpo-{steps}"]["cells"]["3e-05"]["pass@1"] for steps in (1, 2))
    ahead = mean_interval([100 * (b - a) for a, b in zip(one, two, strict=True)])
    numbers = [f"{ahead[name]:+.1f}" for name in ("mean", "low", "high")]
    assert "two steps are not ahead ({} points, {} to {})".format(*numbers) in " ".join(page("opo_vs_grpo").split())


def test_the_simulated_steps():
    simulation = results("streaming_simulation")
    assert simulation_table(simulation) in page("streaming")
    workloads = simulation["workloads"].values()
    for devices in ("8", "16", "32", "64"):
        gains = [each[devices]["gain"] for each in workloads]
        assert f"- {devices} GPUs: {min(gains):.2f}x to {max(gains):.2f}x. " in page("streaming")
    slower = [
        (name, devices)
        for name, each in simulation["workloads"].items()
        for devices, found in each.items()
        if found["disaggregated"]["seconds"] > found["colocated"]["seconds"]
    ]
    assert len(slower) == sum(len(each) for each in workloads) - 1
    assert ("short, 1k", "64") not in slower
