"""Puts the log-probabilities that the update computes into TRL's completions table. They cost no forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

TOKENS, LOGPS = "opo/tokens", "opo/token_logps"
LOG_ROW = "log_row"  # column of the rollout batch: the number of a completion among all that were logged


class TokenLogps:
    """
    Collects the log-probabilities of each completion of a step, from the micro-batches in which it is trained.

    The update sends rows to other ranks and leaves out those whose advantage is 0, so each row carries its number in
    the log. A completion that is left out has no log-probabilities in the table.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Gathers what the ranks have trained, once per step.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens, each by itself and each once.
    """

    def __init__(self, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase) -> None:
        self.accelerator = accelerator
        self.tokenizer = tokenizer
        self._logged = 0  # completions of all ranks so far, in training and evaluation
        self._trained: list[tuple[int, list[int], list[float | None]]] = []  # log row, token ids, log-probabilities
        self._texts: dict[int, str] = {}

    def number(
        self, batch: dict[str, Any], rank: int, num_ranks: int, trained: bool, columns: Mapping[str, Any]
    ) -> None:
        """
        Add an empty entry to the table for each completion of all ranks, and number those that are trained.

        Args:
            batch (`dict[str, Any]`):
                This rank's part of a rollout batch. All ranks have equally many rows.
            rank (`int`), num_ranks (`int`):
                This rank, and how many there are.
            trained (`bool`):
                Whether the completions are trained, as those of an evaluation are not.
            columns (`Mapping[str, Any]`):
                Further columns of the table.
        """
        ids = batch["completion_ids"]
        if trained:
            batch[LOG_ROW] = self._logged + rank * len(ids) + torch.arange(len(ids), device=ids.device)
        self._logged += num_ranks * len(ids)
        for name in (TOKENS, LOGPS):
            columns[name].extend([None] * (num_ranks * len(ids)))

    def add(self, batch: Mapping[str, torch.Tensor], logps: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep the log-probabilities of a micro-batch; a token that is not trained, such as tool output, has none."""
        attended = batch["completion_mask"].bool().tolist()
        columns = [batch[LOG_ROW], batch["completion_ids"], logps.detach().float(), mask.bool()]
        for row, ids, values, trained, present in zip(*(column.tolist() for column in columns), attended, strict=True):
            if any(present):  # not a filler
                length = sum(present)
                known = [value if known else None for value, known in zip(values, trained, strict=True)]
                self._trained.append((row, ids[:length], known[:length]))

    def write(self, columns: Mapping[str, Any]) -> None:
        """Write the step's log-probabilities into the table. All ranks call it together."""
        trained = gather_object(self._trained)
        self.clear()
        if not self.accelerator.is_main_process:
            return
        for row, ids, values in trained:
            place = len(columns[TOKENS]) - (self._logged - row)
            if place >= 0:  # the table holds the latest completions alone
                columns[TOKENS][place], columns[LOGPS][place] = [self._text(token) for token in ids], values

    def clear(self) -> None:
        """Forget an interrupted step."""
        self._trained = []

    def _text(self, token: int) -> str:
        if token not in self._texts:
            text = str(self.tokenizer.decode([token]))
            # SentencePiece drops the space in front of a first word, which a token is here.
            starts_word = str(self.tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
            self._texts[token] = f" {text}" if starts_word and not text.startswith(" ") else text
        return self._texts[token]
