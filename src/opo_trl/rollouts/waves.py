"""Which groups of a streamed step are trained together, and in how many of its micro-batches. Pure Python."""

from dataclasses import dataclass

WAVES = 8  # of a step, at most: rows are sorted by length within a wave, so many small ones are padded more


@dataclass(frozen=True)
class WaveSchedule:
    """
    Cuts a step's groups into waves, in the order in which they are complete, and its micro-batches into their shares.

    A wave ends where a micro-batch's worth of groups does, so that no micro-batch of a wave has more rows than one of a
    step that is not streamed. It has at least an eighth of the step's groups, unless no other group is generating.

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
            are fewer than 1 / `WAVES` of the step's groups.
        """
        if not generating:
            return complete
        available = taken + complete
        for micro_batch in range(available * self.micro_batches // self.prompts, 0, -1):
            groups = -(-self.prompts * micro_batch // self.micro_batches)
            end = -(-groups // self.multiple) * self.multiple
            if end <= available:
                return end - taken if (end - taken) * WAVES >= self.prompts else 0
        return 0

    def share(self, groups: int, used: int, rows: int, last: bool) -> int:
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

        Returns:
            `int`: The share of all groups so far that is not used yet, and at most one micro-batch for each row, so
            that none is without one; at least one is kept for the last wave, which gets all that are left. With 0, the
            rows are trained together with those of the next wave.
        """
        if last:
            return self.micro_batches - used
        due = min(groups * self.micro_batches // self.prompts, self.micro_batches - 1)
        return max(0, min(due - used, rows))
