"""Every refusal of the on-policy contract: its message, with how to fix it."""

import copy
import dataclasses
import pickle
import re

import pytest
import yaml
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from opo_trl import OPOConfig


def config(**fields):
    return OPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **fields)


def test_bare_config_is_the_algorithm():
    bare = config()
    assert bare.num_iterations == 1
    assert bare.steps_per_generation == bare.gradient_accumulation_steps
    assert (bare.beta, bare.entropy_coef, bare.epsilon, bare.epsilon_high, bare.delta) == (0.0, 0.0, None, None, None)
    assert (bare.scale_rewards, bare.loss_type, bare.length_exponent) == ("none", "dapo", 1.0)
    assert bare.disable_dropout
    assert bare.vllm_importance_sampling_mode == "token_truncate"


def test_copies_and_pickles_keep_the_token():
    """It is left out of what the trainer writes, not of what a script does with its arguments."""
    fields = config(hub_token="hf_secret", learning_rate=0.5)
    # transformers fills `generation_batch_size`, and TRL takes it or `steps_per_generation`.
    replaced = dataclasses.replace(fields, seed=7, generation_batch_size=None)
    for made in (copy.copy(fields), copy.deepcopy(fields), pickle.loads(pickle.dumps(fields)), replaced):
        assert (made.hub_token, made.learning_rate) == ("hf_secret", 0.5)


# Field, refused value, an accepted value (how to fix it, in the message).
REFUSED = [
    ("num_iterations", 2, 1),
    ("beta", 0.04, 0.0),
    ("sync_ref_model", True, False),
    ("entropy_coef", 0.001, 0.0),
    ("use_adaptive_entropy", True, False),
    ("scale_rewards", "group", "none"),
    ("scale_rewards", "batch", "none"),
    ("scale_rewards", True, False),
    ("epsilon", 0.2, None),
    ("epsilon", 0.0, None),
    ("epsilon_high", 0.28, None),
    ("delta", 1.5, None),
    ("off_policy_mask_threshold", 0.5, None),
    ("loss_type", "grpo", "dr_grpo"),
    ("loss_type", "bnpo", "dapo"),
    ("loss_type", "sapo", "dapo"),
    ("loss_type", "luspo", "dapo"),
    ("importance_sampling_level", "sequence", "token"),
    ("vllm_importance_sampling_mode", "sequence_mask", "token_truncate"),
    ("vllm_importance_sampling_mode", "sequence_truncate", "token_mask"),
    ("top_entropy_quantile", 0.2, 1.0),
    ("multi_objective_aggregation", "normalize_then_sum", "sum_then_normalize"),
    ("disable_dropout", False, True),
    ("neftune_noise_alpha", 5.0, None),
    ("top_p", 0.95, 1.0),
    ("top_k", 50, 0),
    ("min_p", 0.05, 0.0),
    ("repetition_penalty", 1.1, 1.0),
    ("cache_implementation", "quantized", "static"),
    ("vllm_structured_outputs_regex", r"\d+", None),
    ("temperature", 0.0, 0.6),
    ("bf16_full_eval", True, False),
    ("fp16_full_eval", True, False),
    ("length_exponent", -1.0, 2.0),
    ("length_exponent", float("nan"), 0.0),
]


@pytest.mark.parametrize(("field", "refused", "accepted"), REFUSED)
def test_contradictions_are_refused_by_name(field, refused, accepted):
    with pytest.raises(ValueError, match=f"`{field}` must be") as error:
        config(**{field: refused})
    given = {True: "group"}.get(refused, refused) if field == "scale_rewards" else refused
    assert repr(given) in str(error.value)
    config(**{field: accepted})


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(name):
    with pytest.raises(ValueError, match=f"`optim` must not update .* once per micro-batch, got '{name}'"):
        config(optim=name)
    config(optim="galore_adamw")


@pytest.mark.parametrize("given", [{"split_batches": True}, AcceleratorConfig(split_batches=True)])
def test_splitting_batches_over_ranks_is_refused(given):
    with pytest.raises(ValueError, match="`accelerator_config` must have `split_batches=False`, got True"):
        config(accelerator_config=given)
    config(accelerator_config={"split_batches": False})


@pytest.mark.parametrize("field", ["top_p", "top_k", "repetition_penalty"])
def test_vllm_is_given_every_sampling_setting(field):
    """A server fills what is missing from the model's generation config; transformers' is judged when it is merged."""
    with pytest.raises(ValueError, match=f"with `use_vllm=True`, `{field}` must be .*, got None"):
        config(use_vllm=True, **{field: None})
    config(use_vllm=True, min_p=None)  # TRL passes 0
    config(**{field: None})


FILE = {"use_vllm": True, "vllm_mode": "server", "vllm_weight_transfer": "file", "vllm_weight_dir": "/dev/shm/weights"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_weight_transfer": "gloo"}, "`vllm_weight_transfer` must be 'nccl' or 'file', got 'gloo'"),
        ({"vllm_mode": "colocate"}, "`use_vllm` must be True .* got `use_vllm=True` and `vllm_mode='colocate'`"),
        ({"use_vllm": False}, "`use_vllm` must be True .* got `use_vllm=False` and `vllm_mode='server'`"),
        ({"vllm_weight_dir": None}, "`vllm_weight_dir` must name a directory .* got None"),
        ({"vllm_weight_dir": ""}, "`vllm_weight_dir` must name a directory .* got ''"),
        ({"vllm_weight_transfer": "nccl"}, "`vllm_weight_dir` must be None without .* got '/dev/shm/weights'"),
    ],
)
def test_weights_through_a_file_need_a_server_and_a_directory(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**{**FILE, **fields})
    config(**FILE)


def test_trls_transfer_of_weights_is_the_default():
    assert (config().vllm_weight_transfer, config().vllm_weight_dir) == ("nccl", None)


def test_ligers_layer_kernels_are_accepted():
    """They compute the same layers, for the sampler and for the update alike."""
    assert config(use_liger_kernel=True).use_liger_kernel


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_p": 0.9}, "top_p"),
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": False}, "do_sample"),
        ({"temperature": 0.5}, "temperature"),
        ({"suppress_tokens": [3]}, "suppress_tokens"),
        ({"min_new_tokens": 10}, "min_new_tokens"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"seed": 7}, "seed"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ('{"min_p": 0.1}', "min_p"),
    ],
)
def test_generation_kwargs_must_not_change_the_law(settings, named):
    with pytest.raises(ValueError, match=f"`generation_kwargs`.*`{named}`"):
        config(generation_kwargs=settings)


@pytest.mark.parametrize("settings", [{"n": 1}, {"n": None}, {"logprobs": None}, {"logprobs": 0}])
def test_what_trl_asks_an_engine_for_is_not_for_the_user(settings):
    with pytest.raises(ValueError, match=f"must not have `{next(iter(settings))}`, which the trainer itself sets"):
        config(generation_kwargs=settings)


def test_neutral_generation_kwargs_are_allowed():
    settings = {"top_p": 1.0, "num_beams": 1, "do_sample": True, "temperature": 0.7, "min_p": 0, "use_cache": True}
    assert config(generation_kwargs=settings, temperature=0.7).generation_kwargs == settings


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"steps_per_generation": 4}, "steps_per_generation"),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2}, "steps_per_generation"),
        ({"generation_batch_size": 32}, "generation_batch_size"),
    ],
)
def test_a_rollout_batch_is_one_optimizer_step(fields, named):
    with pytest.raises(ValueError, match=f"`{named}` must .* got .*Leave `{named}` out"):
        config(**fields)


def test_a_rollout_batch_of_several_micro_batches_is_accepted():
    assert config(gradient_accumulation_steps=4).steps_per_generation == 4
    assert config(gradient_accumulation_steps=4, steps_per_generation=4).generation_batch_size == 32
    assert config(gradient_accumulation_steps=4, generation_batch_size=32).steps_per_generation == 4


@pytest.mark.parametrize(
    ("fields", "explained"),
    [
        (
            {"num_generations": 3},
            r"per_device_train_batch_size \(8\) \* gradient_accumulation_steps \(1\) \* 1 process\(es\) = 8 must be a "
            r"multiple of `num_generations` = 3\. Set `per_device_train_batch_size` to 6 or 9, or "
            r"`gradient_accumulation_steps` to 3, or `num_generations` to 2 or 4\.",
        ),
        (
            {"num_generations": 16, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 6},
            r"= 24 must be .* `num_generations` = 16\. Set `per_device_train_batch_size` to 8, or "
            r"`gradient_accumulation_steps` to 4 or 8, or `num_generations` to 12 or 24\.",
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 12},
            r"batch_size \(12\) \* 1 process\(es\) = 12 must be a multiple of `num_generations_eval` = 8"
            r"\. Set `per_device_eval_batch_size` to 8 or 16, or `num_generations_eval` to 6 or 12\.",
        ),
        ({"num_generations": 3, "generation_batch_size": 8}, r"Set `per_device_train_batch_size` to 6 or 9"),
        ({"num_generations": 5, "generation_batch_size": 16}, "Leave `generation_batch_size` out"),
        ({"num_generations": 7, "steps_per_generation": 2}, "Leave `steps_per_generation` out"),
    ],
)
def test_a_batch_that_is_not_whole_groups_is_explained_with_the_fields_that_were_set(fields, explained):
    with pytest.raises(ValueError, match=explained):
        config(**fields)


@pytest.mark.parametrize(("size", "steps", "group"), [(8, 1, 3), (4, 6, 16), (3, 5, 7), (1, 1, 4), (6, 10, 25)])
def test_each_suggested_batch_size_works(size, steps, group):
    fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_generations": group}
    with pytest.raises(ValueError, match="Set `") as error:
        config(**fields)
    suggestions = re.findall(r"`(\w+)` to (\d+(?: or \d+)?)", str(error.value))
    assert {"per_device_train_batch_size", "gradient_accumulation_steps"} <= {name for name, _ in suggestions}
    for name, values in suggestions:
        for value in values.split(" or "):
            config(**fields | {name: int(value)})


def test_dr_grpo_needs_its_constant():
    with pytest.raises(ValueError, match="`max_completion_length`, got None"):
        config(loss_type="dr_grpo", max_completion_length=None)
    config(loss_type="dapo", max_completion_length=None)


def test_a_server_needs_a_limit():
    with pytest.raises(
        ValueError, match="`max_completion_length` must be a number with `vllm_mode='server'`, got None"
    ):
        config(use_vllm=True, vllm_mode="server", max_completion_length=None)
    config(use_vllm=True, vllm_mode="colocate", max_completion_length=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_iterations", 4), ("epsilon", 0.2), ("steps_per_generation", 2), ("gradient_accumulation_steps", 2)],
)
def test_a_field_changed_later_is_caught_on_the_second_look(field, value):
    changed = config()
    setattr(changed, field, value)
    with pytest.raises(ValueError, match="OPO "):
        changed.check_contract()


def test_every_field_is_documented_and_overrides_keep_the_parents_names():
    own = {field.name: field for field in dataclasses.fields(OPOConfig)}
    new = set(own) - {field.name for field in dataclasses.fields(GRPOConfig)}
    assert new == {
        "baseline_weight",
        "length_exponent",
        "log_token_logps",
        "max_refill_rounds",
        "pass_at_k_reward",
        "prompt_sampling",
        "rollout_importance_sampling_correction",
        "skip_uninformative",
        "stream_rollouts",
        "vllm_dtype",
        "vllm_logp_tolerance",
        "vllm_weight_dir",
        "vllm_weight_transfer",
    }
    for name in OPOConfig.__annotations__:
        assert own[name].metadata["help"]
        assert name in OPOConfig.__doc__


def parse(*arguments):
    parser = TrlParser((ScriptArguments, OPOConfig, ModelConfig))
    return parser.parse_args_and_config(["--use_cpu", "--bf16", "false", "--report_to", "none", *arguments])[1]


def test_fields_work_on_the_command_line():
    parsed = parse("--output_dir", "x", "--length_exponent", "1.6", "--loss_type", "dr_grpo", "--temperature", "0.6")
    assert (parsed.length_exponent, parsed.loss_type, parsed.temperature) == (1.6, "dr_grpo", 0.6)
    assert parse("--output_dir", "x", "--scale_rewards", "none", "--disable_dropout").disable_dropout
    with pytest.raises(ValueError, match=r"`epsilon` must be None, got 0\.2"):
        parse("--output_dir", "x", "--epsilon", "0.2")


def test_fields_work_in_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    fields = {"output_dir": "x", "length_exponent": 0.5, "epsilon": None, "generation_kwargs": {"top_p": 1.0}}
    path.write_text(yaml.safe_dump(fields))
    parsed = parse("--config", str(path))
    assert (parsed.length_exponent, parsed.epsilon, parsed.generation_kwargs) == (0.5, None, {"top_p": 1.0})
    path.write_text(yaml.safe_dump({"output_dir": "x", "num_iterations": 2}))
    with pytest.raises(ValueError, match="`num_iterations` must be 1, got 2"):
        parse("--config", str(path))
