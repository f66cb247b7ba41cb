"""Environments with several turns: their output is attended, not trained, and does not count as length."""

import pytest
from datasets import Dataset

from opo_trl import OPOTrainer
from opo_trl.runs.guarded_functions import RewardError
from test_trainer import reinforce_update
from tiny import relative_error, tiny_config, tiny_model, update_of
from tool_turns import LONG, call, rows_of, tool_tokenizer, turns_trainer


class Adder:
    """Owns the problem, the state and the reward."""

    def reset(self, **kwargs) -> str:
        self.total, self.calls = 0, 0
        return " Start at 0."

    def add(self, amount: int) -> str:
        """
        Add to the total.

        Args:
            amount: What is added.

        Returns:
            The total so far.
        """
        self.total += amount
        self.calls += 1
        return f"the total is {self.total}"

    def get_reward(self) -> float:
        return self.total / 4 - 0.125 * self.calls


class Greeter:
    """Another kind, without a reward of its own."""

    def reset(self, **kwargs) -> None:
        self.greeted = 0

    async def greet(self, name: str) -> str:
        """
        Greet somebody.

        Args:
            name: Who is greeted.

        Returns:
            The greeting.
        """
        self.greeted += 1
        return f"hello {name}"


def test_two_turns_with_an_environment_that_owns_problem_and_reward(tmp_path):
    """No dataset and no reward function; rows call the tool never, once, twice, or twice in one turn."""
    one, two, three = (call("add", amount=n) for n in (1, 2, 3))
    first = ["none", one, two, "none at all", three, one + one, "no", two]
    second = [one, "done", two + "", "enough", "that is all"]  # of rows 1, 2, 4, 5 and 7
    third = ["fine", "four more words here"]  # of rows 1 and 4
    trainer = turns_trainer(tmp_path, [first, second, third], environment_factory=Adder)
    update, batch = update_of(trainer), trainer.batch
    rewards = [0, 2 / 4 - 0.25, 2 / 4 - 0.125, 0, 5 / 4 - 0.25, 2 / 4 - 0.25, 0, 2 / 4 - 0.125]
    log = trainer.state.log_history[0]
    assert log["rewards/Adder/mean"] == pytest.approx(sum(rewards) / 8)
    assert log["tools/call_frequency"] == 8 / 8

    tokenizer, rows = tool_tokenizer(), rows_of(batch, rewards)
    sampled = [[text] for text in first]
    for row, text in zip((1, 2, 4, 5, 7), second, strict=True):
        sampled[row].append(text)
    for row, text in zip((1, 4), third, strict=True):
        sampled[row].append(text)
    for (prompt, ids, trained, _), texts in zip(rows, sampled, strict=True):
        assert "Start at 0." in tokenizer.decode(prompt)
        own = [token for token, one_of_ours in zip(ids, trained, strict=True) if one_of_ours]
        assert own == [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert "the total is 3" in tokenizer.decode(rows[4][1])
    assert "the total is 5" in tokenizer.decode(rows[4][1])
    assert relative_error(update, reinforce_update(tiny_model(**LONG), [rows[:4], rows[4:]])) < 1e-5


def test_two_kinds_of_environments_in_one_run(tmp_path):
    """Each row has the tools of its own; a reward function scores all, and one kind adds its own reward."""
    rows = [{"prompt": [{"role": "user", "content": "go"}], "environment": name} for name in ("adder", "greeter")]

    def uses_tools(environments, completions, **kwargs):
        return [getattr(environment, "greeted", 0) + 0.0 for environment in environments]

    first = [call("add", amount=n) for n in (0, 1, 2)] + ["nothing"]
    first += [call("greet", name="you"), "nobody", "nobody else", call("greet", name="me")]
    trainer = turns_trainer(
        tmp_path,
        [first, ["a", "bb", "ccc", "dddd", "eeeee"]],
        train_dataset=Dataset.from_list(rows),
        environment_factory={"adder": Adder, "greeter": Greeter},
        reward_funcs=uses_tools,
    )
    update = update_of(trainer)
    rewards = [-0.125, 0.125, 0.375, 0.0, 1.0, 0.0, 0.0, 1.0]
    kept = rows_of(trainer.batch, rewards)
    assert "hello me" in tool_tokenizer().decode(kept[7][1])
    assert trainer.state.log_history[0]["tools/failure_frequency"] == 0
    assert relative_error(update, reinforce_update(tiny_model(**LONG), [kept[:4], kept[4:]])) < 1e-5


def test_a_tool_that_fails_is_an_answer_to_the_model(tmp_path):
    class Failing(Adder):
        def add(self, amount: int) -> str:
            """
            Add to the total.

            Args:
                amount: What is added.
            """
            self.total += amount
            raise ValueError("no adding today")

    turns = [[call("add", amount=n) for n in range(8)], ["oh" + "!" * n for n in range(8)]]
    trainer = turns_trainer(tmp_path, turns, environment_factory=Failing)
    trainer.train()
    assert trainer.state.log_history[0]["tools/failure_frequency"] == 1
    assert "no adding today" in tool_tokenizer().decode(trainer.batch["completion_ids"][0])


class BrokenReset(Adder):
    def reset(self, **kwargs):
        raise OverflowError("cannot start")


class BrokenReward(Adder):
    async def get_reward(self):
        raise OverflowError("cannot score")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (BrokenReset, "`reset` of the environment 'BrokenReset' failed on rank 0: OverflowError: cannot start"),
        (BrokenReward, "The reward function 'BrokenReward' failed on rank 0: OverflowError: cannot score"),
    ],
)
def test_an_environment_that_fails_is_raised_by_its_name(tmp_path, environment, message):
    """On two ranks: test_distributed.py."""
    trainer = turns_trainer(tmp_path, [["a" * n for n in range(1, 9)]], environment_factory=environment)
    with pytest.raises(RewardError, match=message):
        trainer.train()


def test_a_factory_that_fails_later_is_raised(tmp_path):
    """TRL makes the first environment when the trainer is built, and the others when a batch needs them."""
    made = []

    def factory():
        made.append(Adder())
        if len(made) > 3:
            raise OverflowError("no more rooms")
        return made[-1]

    trainer = turns_trainer(tmp_path, [["a"] * 8], environment_factory=factory)
    with pytest.raises(RewardError, match="The environment factory failed on rank 0: OverflowError: no more rooms"):
        trainer.train()
    assert len(made) == 8
    assert trainer.state.global_step == 0


def test_without_a_dataset_the_length_of_training_must_be_given(tmp_path):
    with pytest.raises(ValueError, match="`max_steps` must be set to a positive value"):
        OPOTrainer(
            tiny_model(**LONG),
            args=tiny_config(tmp_path, max_steps=-1),
            processing_class=tool_tokenizer(),
            environment_factory=Adder,
        )
