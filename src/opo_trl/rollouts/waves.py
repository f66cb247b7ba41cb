"""Which groups of a streamed step are trained together, and in how many of its micro-batches. Pure Python."""

from dataclasses import dataclass

# A wave has at least one in so many, rounded down, of the groups that no wave has taken. Rows are sorted by length
# within a wave, so small waves have more padding; but what the last wave takes is trained after the last completion.
GROUPS_LEFT = 4


@dataclass(frozen=True)
class WaveSchedule:
    """
    Cuts a step's groups into waves, in the order in which they are complete, and its micro-batches into their shares.

    A wave ends where a micro-batch's worth of groups does, so that no micro-batch of a wave has more rows than one of a
    step that is not streamed. With refill rounds it has at most twice as many; those of the last wave have more if far
    more of its groups are informative than was expected. A wave has at least a quarter, rounded down, of the
    groups that no wave has taken, unless none is generating. So the last waves, of the longest completions, are small.

    Args:
        prompts (`int`):
            Groups of the step, of all ranks, without refill rounds.
        micro_batches (`int`):
            Micro-batches that every rank runs in the step.
        multiple (`int`, *optional*, defaults to `1`):
            The groups of a wave are a multiple of this, so that all ranks get equally many rows. Divides `prompts`.
    """

    prompts: int
    micro_batches: int
    multiple: int = 1

    def wave_size(self, taken: int, complete: int, generating: int) -> int:
        """
        Return how many groups the next wave takes.

        Args:
            taken (`int`):
                Groups of earlier waves.
            complete (`int`):
                Groups that are complete and in no wave yet.
            generating (`int`):
                Groups that are not complete.

        Returns:
            `int`: As many as end with a micro-batch, or all if none is generating; 0 if these are not complete yet, or
            are fewer than 1 in `GROUPS_LEFT`, rounded down, of those that no wave has taken.
        """
        if not generating:
            return complete
        available = taken + complete
        for micro_batch in range(available * self.micro_batches // self.prompts, 0, -1):
            groups = -(-self.prompts * micro_batch // self.micro_batches)
            end = -(-groups // self.multiple) * self.multiple
            if end <= available:
                return end - taken if end - taken >= (complete + generating) // GROUPS_LEFT else 0
        return 0

    def expected(self, informative: int, taken: int, submitted: int) -> int:
        """
        Return how many informative groups a step with refill rounds is expected to have besides those of its waves.

        Args:
            informative (`int`):
                Informative groups of all waves so far.
            taken (`int`):
                Groups of all waves so far.
            submitted (`int`):
                Groups of all prompts that are submitted. Further rounds may follow.

        Returns:
            `int`: Those that the step needs to have as many as prompts; or more, if the prompts that are submitted have
            the share of informative groups that the waves so far have.
        """
        return max(self.prompts - informative, -(-(submitted - taken) * informative // taken))

    def share(self, groups: int, used: int, rows: int, last: bool, waiting: int = 0, expected: int = 0) -> int:
        """
        Return in how many micro-batches every rank trains the rows that wait for it.

        Args:
            groups (`int`):
                Groups so far, including those of the waiting rows, on the scale on which a step has `prompts`.
            used (`int`):
                Micro-batches of earlier waves.
            rows (`int`):
                Rows that wait, of the rank with the most.
            last (`bool`):
                Whether no wave follows.
            waiting (`int`, *optional*, defaults to `0`):
                With refill rounds, the groups that the rows are of, on the same scale.
            expected (`int`, *optional*, defaults to `0`):
                With refill rounds, the groups that are expected to follow. Without them, `prompts` is exact.

        Returns:
            `int`: The share of all groups so far that is not used yet, and at most one micro-batch for each row, so
            that none is without one; at least one is kept for the last wave, which gets all that are left. If groups
            are expected to follow, those that wait get no more of the micro-batches that are left than their share of
            both. With 0, the rows are trained together with those of the next wave.
        """
        left = self.micro_batches - used
        if last:
            return left
        due = min(groups * self.micro_batches // self.prompts, self.micro_batches - 1) - used
        if expected:
            due = min(due, left * waiting // (waiting + expected))
            # Rather than in micro-batches of more than twice the usual size, they are trained with the next wave.
            if waiting * self.micro_batches > 2 * due * self.prompts:
                return 0
        return max(0, min(due, rows))
