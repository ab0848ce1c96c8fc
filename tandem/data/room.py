"""How long a row may be, and which token ids it may hold, for the models that will read it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Literal

from tandem.errors import UserError
from tandem.types import Limits

TooLong = Literal["refuse", "truncate", "drop"]
"""What happens to a row above the limit: an error, its left end is cut off, or it is left out."""


class Room:
    """Tokens that a row may have, who says so (``--max-length``, or a model whose positions end before), and what
    becomes of a longer one."""

    def __init__(
        self,
        max_length: int | None = None,
        limits: Seq[Limits] = (),
        new_tokens: int = 0,
        *,
        long_rows: TooLong = "refuse",
    ) -> None:
        """``new_tokens`` may come after the row. Raises UserError where they leave no room for one."""
        self.new_tokens, self.long_rows = new_tokens, long_rows
        bounded = [one for one in limits if one.positions is not None]
        self.tightest = min(bounded, key=lambda one: one.positions or 0, default=None)
        self.known = min((one for one in limits if one.vocabulary), key=lambda one: one.vocabulary or 0, default=None)
        positions = self.tightest.positions if self.tightest else None
        if positions is not None and positions <= new_tokens:
            raise UserError(f"max_new_tokens: {new_tokens} leave no room for a prompt in {self._positions()}")
        room = None if positions is None else positions - new_tokens
        self.of_model = room is not None and (max_length is None or room < max_length)
        self.limit = room if self.of_model else max_length

    def check_ids(self, token_ids: Seq[int]) -> None:
        """Raises UserError for a token id that a model has no embedding of."""
        if self.known is None or (largest := max(token_ids)) < (self.known.vocabulary or 0):
            return
        raise UserError(
            f"token id {largest}, and the embedding of {self.known.whose} has {self.known.vocabulary} rows: the "
            "tokenizer is another model's, or has got tokens that the model was not resized for"
        )

    def explain(self, length: int) -> str:
        """Why a row of ``length`` tokens is too long, and what to do."""
        if not self.of_model:
            return (
                f"{length} tokens, more than the limit of {self.limit}; raise the limit, or choose to truncate or to "
                "drop long rows"
            )
        new = f" and up to {self.new_tokens} new ones" if self.new_tokens else ""
        less = "lower max_new_tokens, or " if self.new_tokens else ""
        return (
            f"{length} tokens{new}, more than {self._positions()}; {less}choose to truncate or to drop long rows "
            "(long_rows)"
        )

    def _positions(self) -> str:
        assert self.tightest is not None
        return f"the {self.tightest.positions} positions of {self.tightest.whose}"
