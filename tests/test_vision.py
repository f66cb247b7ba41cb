"""A vision-language model: the gradient of TRL's own trainer, given OPO's advantages and the same completions."""

import pytest
import torch
from trl import GRPOTrainer

from opo_trl import OPOTrainer
from test_baselines import oracle_baseline
from test_resume import letters_reward
from tiny import GROUP_SIZE, relative_error, tiny_config, update_of
from tiny_vision import picture_problems, tiny_processor, tiny_vision_model


def reward(completions, **kwargs):
    return letters_reward([completion[0]["content"] for completion in completions])


class Recording(OPOTrainer):
    """Samples, and keeps the completions of each step."""

    def _generate_single_turn(self, *args, **kwargs):
        self.sampled = [*getattr(self, "sampled", []), super()._generate_single_turn(*args, **kwargs)]
        return self.sampled[-1]

    def _generate_and_score_completions(self, inputs):
        self.batch = super()._generate_and_score_completions(inputs)
        return self.batch


class Replaying(GRPOTrainer):
    """TRL's loss and micro-batches, with the same completions, and OPO's advantages by the definition."""

    uncertain = False

    def _generate_single_turn(self, *args, **kwargs):
        return self.sampled.pop(0)

    def _calculate_rewards(self, *args, **kwargs):
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        self.rewards = rewards_per_func[:, 0]
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        mask, fields = batch["completion_mask"], ("pixel_values", "num_images")
        weights = mask.sum(dim=1).float()
        if self.uncertain:
            with torch.no_grad():
                logps, _, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                    torch.cat([batch["prompt_mask"], mask], dim=1),
                    mask.size(1),
                    **{name: batch[name] for name in fields if name in batch},
                )
            weights = ((1 - logps.exp()).square() * mask).sum(dim=1)
        groups = zip(self.rewards.split(GROUP_SIZE), weights.split(GROUP_SIZE), strict=True)
        batch["advantages"] = torch.cat(
            [rewards - oracle_baseline(rewards.tolist(), weights.tolist(), 1.0) for rewards, weights in groups]
        )
        return batch


def vision_trainer(trainer_class, output_dir, pictures_of_each, **settings):
    config = tiny_config(
        output_dir,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=len(pictures_of_each),
        max_completion_length=10,
        learning_rate=0.1,
        **settings,
    )
    if trainer_class is not Recording:
        config.epsilon = 0.2
    return trainer_class(
        tiny_vision_model(), reward, config, picture_problems(pictures_of_each), processing_class=tiny_processor()
    )


@pytest.mark.parametrize(
    ("pictures_of_each", "baseline_weight"), [([1, 2], "length"), ([3, 1, 2], "length"), ([2, 1], "uncertainty")]
)
def test_image_rows_get_trls_gradient_with_opos_advantages(tmp_path, caplog, pictures_of_each, baseline_weight):
    """Two steps, several micro-batches, with different numbers of pictures in a row."""
    settings = {"max_steps": 2, "baseline_weight": baseline_weight}
    trainer = vision_trainer(Recording, tmp_path, pictures_of_each, **settings)
    update = update_of(trainer)
    assert len(trainer.batch["pixel_values"]) == sum(trainer.batch["num_images"]) == GROUP_SIZE * sum(pictures_of_each)
    assert caplog.text.count("cannot be cut row by row") == 1
    if baseline_weight == "length":
        assert all(abs(entry["loss"]) < 1e-6 for entry in trainer.state.log_history if "loss" in entry)

    trls = vision_trainer(Replaying, tmp_path, pictures_of_each, **settings)
    trls.sampled, trls.uncertain = trainer.sampled, baseline_weight == "uncertainty"
    expected = update_of(trls)
    assert relative_error(update, expected) < 1e-5
    of_the_vision_tower = [value for name, value in expected.items() if "vision_tower" in name]
    assert any(value.abs().max() > 0 for value in of_the_vision_tower)


def test_a_row_without_a_picture_beside_rows_with_pictures_is_not_supported(tmp_path):
    """Nor is it by TRL 1.16 itself, whose error this is: transformers' processors take no `None` for a picture."""
    for trainer_class in (Recording, GRPOTrainer):
        trainer = vision_trainer(trainer_class, tmp_path, [0, 1])
        with pytest.raises(TypeError, match="only a single or a list of entries is supported"):
            trainer.train()


def test_an_image_run_evaluates_and_logs_its_pictures(tmp_path):
    trainer = vision_trainer(Recording, tmp_path, [1, 1], log_completions=True, num_completions_to_print=1)
    trainer.train()
    assert len(trainer._logs["images"]) == 2 * GROUP_SIZE
    metrics = trainer.evaluate(picture_problems([1, 1]))
    assert "eval_reward" in metrics
