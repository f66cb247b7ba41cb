"""Where a resumed run continues in a streamed dataset, whose length is unknown."""

import math

from transformers import TrainerState


def streamed_position(state: TrainerState) -> tuple[int, int]:
    """
    Return the pass over the stream that a checkpoint was saved in, and the optimizer steps made in that pass.

    transformers 5.23 takes a streamed dataset for one epoch of `max_steps` steps. A run that is resumed after its first
    pass would therefore skip to the end of the stream, and then visit the second pass's first prompts again, in another
    order than before (no issue is filed). While it trains it counts `epoch = pass + steps in the pass / max_steps`:
    both numbers are read back from that. Delete this when transformers continues in a later pass.

    Args:
        state ([`~transformers.TrainerState`]):
            State of the checkpoint, with the `max_steps` of the run that saved it.
    """
    fraction, passes = math.modf(state.epoch or 0.0)
    steps = round(fraction * state.max_steps)
    if steps == 0 and passes > 0:  # all of `max_steps` in one pass
        return int(passes) - 1, state.max_steps
    return int(passes), steps
