"""
Each private name of TRL that the trainer stands on, one test a name.

When TRL moves, the test that fails names the seam: read the parent's new code there, then the override in one of
`TRAINERS`. Nothing else in the package may touch these names (`test_only_the_trainers_touch_trls_insides`).
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections import deque
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, Trainer, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils.hub import PushInProgress
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient, parse_logprobs
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import utils as trl_models
from trl.trainer import utils as trl_utils

import opo_trl
from opo_trl import OPOTrainer
from opo_trl.config import CONTRACT
from opo_trl.rewards import boxed_format_reward
from opo_trl.runs.model_card import NO_BASE_MODEL, NO_REPOSITORY, VERSIONS
from opo_trl.runs.renamed_names import _METHODS
from opo_trl.update.rollout_batch import FORWARD_ARGUMENTS
from tiny import GROUP_SIZE, scripted_trainer, tiny_model
from update_phase import set_lm_head


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_constructor():
    names = ["self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"]
    assert parameters(GRPOTrainer.__init__)[:7] == names
    assert parameters(OPOTrainer.__init__)[:7] == names
    assert {"environment_factory", "rollout_func", "peft_config", "tools"} <= set(parameters(GRPOTrainer.__init__))


def test_class_attributes():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, "else Trainer divides our loss by the accumulation steps again"
    assert set(GRPOTrainer._paper) == {"title", "id", "citation"} == set(OPOTrainer._paper)
    assert isinstance(GRPOTrainer._name, str)
    assert isinstance(GRPOTrainer._tag_names, list)


def test_calculate_rewards(tmp_path):
    """Called with this batch's rows, returns every rank's rewards: (N, number of functions), NaN for None."""
    assert parameters(GRPOTrainer._calculate_rewards)[1:] == [
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ]
    returned = []

    class Recording(OPOTrainer):
        def _calculate_rewards(self, *args, **kwargs):
            returned.append(super()._calculate_rewards(*args, **kwargs))
            return returned[0]

    trainer = scripted_trainer(tmp_path, per_device_train_batch_size=24)
    trainer.__class__ = Recording
    trainer.train()
    assert returned[0].shape == (24, 1)
    assert torch.isnan(returned[0]).sum() == 4


def test_generate_and_score_completions(tmp_path, monkeypatch):
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    seen = []
    original = GRPOTrainer._generate_and_score_completions
    monkeypatch.setattr(
        GRPOTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: seen.append(original(self, inputs)) or seen[0],
    )
    scripted_trainer(tmp_path).train()
    output = seen[0]
    required = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
    assert required <= output.keys()
    assert "old_per_token_logps" not in output, "aligned generation must need no second forward"
    assert output["advantages"].shape == (8,)
    assert output["completion_mask"].shape == output["completion_ids"].shape


def test_generation_of_a_batch_and_the_weights_that_vllm_gets():
    """Each call appends one mean length, over all ranks; the weights are sent by a method that can be measured."""
    assert parameters(GRPOTrainer._generate) == ["self", "prompts"]
    source = inspect.getsource(GRPOTrainer._generate)
    mean = r'\["completions/mean_length"\]\.append\(agg_completion_lengths\.float\(\)\.mean\(\)\.item\(\)\)'
    assert len(re.findall(mean, source)) == 1
    assert 'self._metrics[mode]["num_tokens"] = [' in source, "one number for the run, not one per call"
    for method in (GRPOTrainer._generate, GRPOTrainer._generate_single_turn):
        assert "self.vllm_generation.sync_weights()" in inspect.getsource(method)


def test_metrics_of_a_call_that_refilling_pools():
    """Those whose names decide how the rounds of a step are joined, and those that are computed anew."""
    source = inspect.getsource(sys.modules[GRPOTrainer.__module__])
    pooled = [f"completions/{kind}_{of}length" for kind in ("mean", "min", "max") for of in ("", "terminated_")]
    pooled += ["completions/clipped_ratio", "tools/call_frequency", "tools/failure_frequency", "reward", "reward_std"]
    assert [name for name in pooled if f'["{name}"].append(' not in source] == []
    assert all(f'[f"rewards/{{reward_func_name}}/{kind}"].append(' in source for kind in ("mean", "std"))


def test_prepare_inputs_keeps_extra_entries_of_the_batch(tmp_path):
    """`loss_normalizer`, a scalar, must reach every micro-batch."""
    seen = []

    class Recording(OPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(inputs["loss_normalizer"].item())
            return super()._compute_loss(model, inputs)

    trainer = scripted_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.__class__ = Recording
    trainer.train()
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_generation_of_one_turn_and_of_tools(tmp_path):
    """The first returns completions first, the second third; and a run's state that outlives an exception."""
    returned = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_single_turn))).body[0].body[-1]
    assert ast.unparse(returned) == "return (completion_ids, logprobs)"
    returned = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._tool_call_loop))).body[0].body[-1]
    assert ast.unparse(returned).startswith("return (tool_mask, completions, completion_ids, ")
    trainer = scripted_trainer(tmp_path)
    assert trainer._tokenizer.pad_token_id == 0
    assert (trainer._step, trainer._buffered_inputs) == (0, None)
    assert trainer._pending_metrics == trainer._pending_extra_logs == {}
    trainer.train()
    assert trainer._step == 1
    assert trainer._tr_loss.shape == ()


def test_the_engine_is_built_without_a_dtype():
    """`opo_trl.on_policy.engine_dtype` gives it one by TRL's name for `vllm.LLM`, and asks an engine for its own."""
    assert parameters(GRPOTrainer._generate_single_turn)[1:3] == ["prompt_ids", "images"]
    source = inspect.getsource(VLLMGeneration)
    assert source.count("LLM(") == 1
    assert "self.llm = LLM(" in source
    assert "dtype=" not in source
    assert "self.vllm_client = VLLMClient(" in source
    assert ".llm.llm_engine.model_config.max_model_len" in inspect.getsource(GRPOTrainer)
    assert 'vllm_client.get_server_info()["model_config"]' in inspect.getsource(GRPOTrainer)
    assert "raise RuntimeError(" in inspect.getsource(VLLMClient.get_server_info), "of a server that does not report"


def test_compute_loss():
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]


def test_get_per_token_logps_and_entropies(tmp_path):
    names = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert names[1:5] == ["model", "input_ids", "attention_mask", "logits_to_keep"]
    assert {"batch_size", "compute_entropy", "compute_aux_loss", "pixel_values", "num_images"} <= set(names)
    trainer = scripted_trainer(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), logits_to_keep=3, compute_entropy=True, compute_aux_loss=False
    )
    full = trainer.model(ids).logits[0, 1:-1].log_softmax(dim=-1)
    assert torch.allclose(logps[0], full[torch.arange(3), ids[0, 2:]], atol=1e-5)
    assert torch.allclose(entropies[0], -(full.exp() * full).sum(dim=-1), atol=1e-5)
    assert aux_loss is None


def test_the_fused_lm_head_chooses_its_positions(monkeypatch):
    """On a CPU all of them, on CUDA the labelled ones, as docs/update.md says; the benchmark replaces both names."""
    kernel, seen = trl_utils._ChunkedLogProbFunction, []

    class Seen:
        @staticmethod
        def apply(hidden, *args):
            seen.append(len(hidden))
            return kernel.apply(hidden, *args)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Seen)
    monkeypatch.setattr(trl_utils, "_use_triton", trl_utils._use_triton)  # restored after the test
    model = tiny_model()
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.arange(3, 15).view(2, 6)
    labels = torch.where(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]]).bool(), ids, -100)
    every = model(ids, labels=labels, fused_lm_head=True)
    assert seen == [2 * 5]
    set_lm_head("completions")
    labelled = model(ids, labels=labels, fused_lm_head=True)
    assert seen == [2 * 5, 6]
    torch.testing.assert_close(labelled.log_probs, every.log_probs)
    set_lm_head("none")
    model(ids, labels=labels, fused_lm_head=True).log_probs.sum().backward()
    assert seen == [2 * 5, 6]
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad.any()


def test_what_the_forward_takes_besides_tokens():
    tokens = {"self", "model", "input_ids", "attention_mask", "logits_to_keep"}
    options = {"batch_size", "compute_entropy", "compute_aux_loss"}
    forward = set(parameters(GRPOTrainer._get_per_token_logps_and_entropies))
    assert forward - tokens - options == set(FORWARD_ARGUMENTS)


def test_metrics_and_logs(tmp_path):
    trainer = scripted_trainer(tmp_path)
    assert set(trainer._metrics) == {"train", "eval"}
    assert trainer._metrics["train"]["new"] == []
    assert isinstance(trainer._logs["advantages"], deque)
    assert isinstance(trainer._logs["prompt"], deque), "empty where nothing was sampled"


def test_extra_columns_of_the_completions_table(tmp_path):
    """`LoggedCompletions` logs one per rank before the rewards are gathered, and those of all ranks afterwards."""
    trainer = scripted_trainer(tmp_path)
    assert parameters(GRPOTrainer._log_completion_extra) == ["self", "column", "values"]
    assert parameters(GRPOTrainer._calculate_rewards)[-1] == "completion_ids_list"
    trainer._log_completion_extra("column", [1])
    assert trainer._pending_extra_logs["column"] == [1]
    assert isinstance(trainer._logs["extra"]["new"], deque)
    assert trainer.eos_token_ids == [trainer.processing_class.eos_token_id]


def test_attributes_that_the_parent_sets(tmp_path):
    trainer = scripted_trainer(tmp_path, temperature=0.6)
    assert trainer.num_generations == trainer.num_generations_eval == GROUP_SIZE
    assert (trainer.loss_type, trainer.max_completion_length, trainer.temperature) == ("dapo", 32, 0.6)
    assert trainer.reward_func_names == ["scripted_reward"]
    assert trainer.reward_weights.tolist() == [1.0]
    assert (trainer.use_vllm, trainer.use_transformers_continuous_batching) == (False, False)
    assert trainer.rollout_func is not None
    assert trainer.aux_loss_enabled is False
    assert trainer.router_aux_loss_coef == 0.0


def test_generation_config_is_merged_as_generate_merges_it(tmp_path):
    """`_prepare_generation_config` is transformers' own; it fills what TRL left None from the model's config."""
    trainer = scripted_trainer(tmp_path, rollout=None, reward_funcs=boxed_format_reward)
    assert isinstance(trainer.generation_config, GenerationConfig)
    trainer.model.generation_config.typical_p = 0.4
    merged, _ = trainer.model._prepare_generation_config(trainer.generation_config)
    assert (merged.typical_p, merged.do_sample, merged.top_k) == (0.4, True, 0)


def test_accumulation_is_counted_by_the_parent(tmp_path):
    trainer = scripted_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.current_gradient_accumulation_steps == 4
    assert trainer.accelerator.sync_gradients is True


def test_generation_by_a_server():
    """What `opo_trl.rollouts.server_generation` puts in the place of TRL's classes, and what it overrides of them."""
    module = sys.modules[GRPOTrainer.__module__]
    assert module.VLLMGeneration is VLLMGeneration
    assert "VLLMGeneration(" in inspect.getsource(GRPOTrainer.__init__)
    connect = inspect.getsource(VLLMGeneration._init_vllm)
    assert "self.vllm_client = VLLMClient(" in connect
    assert "self.vllm_client.init_communicator(device=" in connect
    assert connect.rstrip().endswith("accelerator.wait_for_everyone()"), "where ranks meet after a failure"
    assert vllm_generation.VLLMClient is VLLMClient
    assert parameters(VLLMGeneration.sync_weights) == ["self"]
    assert parameters(VLLMGeneration.generate)[:4] == ["self", "prompts", "images", "num_generations"]
    assert parameters(VLLMGeneration._place_features) == ["self", "features", "prompt_ids"]
    assert "broadcast_object_list(obj_list, from_process=0)" in inspect.getsource(VLLMGeneration.generate)
    names = ["self", "base_url", "host", "server_port", "group_port", "connection_timeout"]
    assert parameters(VLLMClient.__init__) == names
    assert "self.session = requests.Session()" in inspect.getsource(VLLMClient.__init__)
    assert parameters(VLLMClient.check_server) == ["self", "total_timeout", "retry_interval"]
    assert parameters(VLLMClient.init_communicator) == ["self", "device"]
    assert parameters(VLLMClient.update_named_params) == ["self", "metadata", "named_params"]
    assert parameters(VLLMClient.reset_prefix_cache) == ["self"]
    assert parameters(VLLMClient.image_features)[:2] == ["self", "images"]
    assert parameters(VLLMClient.generate)[:4] == ["self", "prompts", "features", "n"]


def test_a_streamed_step_generates_and_steps_as_the_parents_do():
    """What `opo_trl.rollouts.streamed_steps` does before the first wave, and when gradients are scaled."""
    generation = inspect.getsource(GRPOTrainer._generate_single_turn)
    synchronise = generation.index("if self.state.global_step != self._last_loaded_step:")
    assert synchronise < generation.index("self.vllm_generation.sync_weights()")
    assert "_, completion_ids, logprobs, _ = self.vllm_generation.generate(" in generation
    assert parameters(GRPOTrainer._tokenize_prompts) == ["self", "prompts"]
    assert "prompt_ids, images, multimodal_fields = self._tokenize_prompts(" in inspect.getsource(GRPOTrainer._generate)
    server_mode = inspect.getsource(VLLMGeneration.generate)
    assert "ordered_set_of_prompt_ids = all_prompts[::num_generations]" in server_mode
    assert "accelerator.process_index * len(prompts)" in server_mode
    assert parameters(parse_logprobs) == ["choices_logprobs"]
    assert parameters(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    epoch = inspect.getsource(Trainer._run_epoch)
    order = [epoch.index(f"self.{name}(") for name in ("training_step", "_clip_grad_norm", "_get_grad_norm")]
    assert order == sorted(order)


# Fields of GRPOConfig that cannot contradict OPO, or that `OPOConfig.check_contract` judges apart from its table.
JUDGED_APART = {"generation_batch_size", "generation_kwargs", "steps_per_generation", "temperature"}
HARMLESS = {
    "cast_lm_head_to_fp32", "chat_template_kwargs", "ds3_gather_for_generation", "log_completions",
    "log_completions_hub_repo", "log_multimodal", "log_unique_prompts", "mask_truncated_completions",
    "max_completion_length", "max_tool_calling_iterations", "model_init_kwargs", "num_completions_to_print",
    "num_generations", "num_generations_eval", "pad_to_multiple_of", "reward_weights", "router_aux_loss_coef",
    "shuffle_dataset", "transformers_continuous_batching_config", "trust_remote_code",
    "use_transformers_continuous_batching", "use_transformers_paged", "use_vllm",
    # shape what is refused: the KL term, the reference model, the entropy bonus, other loss types
    "entropy_coef_delta", "entropy_coef_max", "entropy_coef_min", "entropy_target", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "use_bias_correction_kl", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_neg",
    "vespo_k_pos", "vespo_lambda_neg", "vespo_lambda_pos",
    # where vLLM runs, and the bounds of the token-level correction of its mismatch
    "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_max_model_length", "vllm_mode",
    "vllm_model_impl", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_tensor_parallel_size", "vllm_importance_sampling_correction", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
}  # fmt: skip


def test_every_field_of_the_installed_grpo_config_is_judged():
    """A release that adds a field fails here, by name, before the field can make OPO something else unseen."""
    fields = set(GRPOConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__)
    judged = {rule.field for rule in CONTRACT}
    assert judged <= set(GRPOConfig.__dataclass_fields__)
    assert fields - judged - JUDGED_APART - HARMLESS == set()
    assert not judged & (JUDGED_APART | HARMLESS)


TRAINERS = {
    "trainer.py",
    "on_policy/on_policy_checks.py",
    "report/logged_completions.py",
    "rollouts/server_generation.py",  # of TRL's generation
    "rollouts/step_rollouts.py",
    "rollouts/streamed_steps.py",
    "update/planned_updates.py",
    "runs/measured_phases.py",
    "runs/reliable_runs.py",
}


def test_only_the_trainers_touch_trls_insides():
    package = Path(opo_trl.__file__).parent
    for path in package.rglob("*.py"):
        source = path.read_text()
        assert "trl.experimental" not in source
        assert "trl.trainer" not in source, f"{path.name}: import from trl's public names"
        if path.relative_to(package).as_posix() not in TRAINERS:
            assert not re.search(r"super\(\)\._(?!_)|trainer\._|self\._(metrics|logs)", source), path.name


def test_get_train_sampler(tmp_path):
    """The first epoch keeps TRL's order; TRL's second one depends on having drawn the first."""
    trainer = scripted_trainer(tmp_path, shuffle_dataset=True)
    theirs, ours = GRPOTrainer._get_train_sampler(trainer), trainer._get_train_sampler()
    assert theirs.seed == trainer.args.seed
    assert theirs.num_samples // theirs.batch_size == 3, "six prompts, two a step"
    first, second, fresh = list(theirs), list(theirs), list(GRPOTrainer._get_train_sampler(trainer))
    assert list(ours) == first == fresh != second
    assert len(ours) == len(theirs)
    trainer.state.global_step = 3
    assert list(ours) != first
    assert list(trainer._get_train_sampler()) == list(ours), "whoever asks in the second epoch gets the same"


def test_checkpoints_and_gradient_norm():
    """Seams on transformers' Trainer, which TRL passes on."""
    assert parameters(GRPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(GRPOTrainer._save_optimizer_and_scheduler) == ["self", "output_dir"]
    assert parameters(GRPOTrainer._save) == ["self", "output_dir", "state_dict"]
    assert parameters(rotate_checkpoints)[:3] == ["output_dir", "save_total_limit", "best_model_checkpoint"]
    assert "use_mtime" in parameters(rotate_checkpoints)
    assert TRAINER_STATE_NAME == "trainer_state.json", "opo_trl.runs.checkpoints knows a checkpoint by it"
    assert parameters(GRPOTrainer._push_from_checkpoint) == ["self", "checkpoint_folder"]
    assert parameters(GRPOTrainer._get_grad_norm) == ["self", "model", "grad_norm"]
    assert parameters(GRPOTrainer.train)[1] == "resume_from_checkpoint"
    assert parameters(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]


def test_the_arguments_are_pickled_in_save(tmp_path):
    """The file holds what `args` has during the parent's `_save`."""
    trainer = scripted_trainer(tmp_path, save_total_limit=3, hub_token="hf_secret")
    GRPOTrainer._save(trainer, str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / TRAINING_ARGS_NAME, weights_only=False)
    assert (saved.save_total_limit, saved.hub_token) == (3, "hf_secret")


def test_what_saving_looks_at(tmp_path):
    trainer = scripted_trainer(tmp_path)
    assert (trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled) == (False, False)
    assert trainer.state.best_global_step is None
    assert trainer.accelerator.mixed_precision == "no"
    assert trainer.accelerator.scaler is None


def test_the_wandb_callback_starts_its_run_in_setup():
    assert parameters(WandbCallback.setup) == ["self", "args", "state", "model", "kwargs"]
    assert "if self._wandb.run is None" in inspect.getsource(WandbCallback.setup), "a run that is there must be kept"


def test_pushes():
    """Seams on transformers' Trainer: it starts pushes in the background, and never asks what became of them."""
    assert parameters(GRPOTrainer.init_hf_repo)[:2] == ["self", "token"]
    assert parameters(GRPOTrainer.push_to_hub)[:3] == ["self", "commit_message", "blocking"]
    assert parameters(GRPOTrainer._finalize_training) == ["self", "trial", "num_train_samples", "start_time"]
    assert parameters(GRPOTrainer._load_best_model) == ["self"]
    assert "self._load_best_model()" in inspect.getsource(Trainer._finalize_training)
    assert parameters(Accelerator.end_training) == ["self"]
    assert parameters(GRPOTrainer.create_model_card) == ["self", "model_name", "dataset_name", "tags"]
    source = inspect.getsource(Trainer._push_from_checkpoint)
    assert "push_jobs = [model_push_job]" in source, "the jobs of a push: the model first, then the checkpoint"
    assert "PushInProgress(push_jobs)" in source
    assert PushInProgress(["job"]).jobs == ["job"]


def test_what_trl_writes_into_a_card_without_a_base_model_and_a_repository(tmp_path):
    trainer = scripted_trainer(tmp_path)
    GRPOTrainer.create_model_card(trainer, model_name="name")
    card = (tmp_path / "README.md").read_text()
    assert all(text in card for text in (NO_BASE_MODEL, NO_REPOSITORY, VERSIONS))


def test_where_a_resumed_run_starts():
    """Seams on transformers' Trainer: the epoch, and the micro-batches to skip in it."""
    names = ["self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"]
    assert parameters(GRPOTrainer._init_training_state) == names
    source = inspect.getsource(Trainer._run_epoch)
    assert "self.state.epoch = epoch + (step + 1) / steps_in_epoch" in source, "`streamed_position` reads this back"
    assert "max_steps * args.gradient_accumulation_steps" in inspect.getsource(Trainer.set_initial_training_values)


def test_environments_are_reset_right_before_generation(tmp_path):
    """`reset` is called on the instance, and methods are read from the class: replacing the first is not a new tool."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.index("environment.reset(") < source.index("self._generate(prompts)")
    assert "getmembers(type(instance)" in inspect.getsource(GRPOTrainer.__init__)
    trainer = scripted_trainer(tmp_path)
    assert trainer.environment_factories is None
    assert "self._environment_pool[name] = [instance]" in inspect.getsource(GRPOTrainer.__init__)
    assert parameters(GRPOTrainer._generate) == ["self", "prompts"]


def test_a_hyperparameter_search_needs_a_model_init():
    assert "model_init" not in parameters(GRPOTrainer.__init__)
    assert "if self.model_init is None" in inspect.getsource(Trainer.hyperparameter_search)


def test_names_that_transformers_has_renamed_and_trl_still_uses():
    """When this fails, TRL uses the newer names: delete `runs/renamed_names.py`."""
    assert {field.name: field.default for field in dataclasses.fields(GRPOConfig)}["gradient_checkpointing"] is True
    calls = inspect.getsource(trl_models)
    assert all(f".{name}" in calls for name in _METHODS)
