"""What is found when a configuration is checked before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from npo_core.interfaces import NearFutureError

Status = Literal["ok", "warning", "unchecked", "failed"]
"""`unchecked`: it could not be looked at here, and `said` has the reason. `warning`: this machine does not fit, but
another may."""


@dataclass(frozen=True)
class Check:
    """One finding."""

    check: str
    """What was looked at."""
    status: Status
    field: str | None
    """The field of the configuration that it is about, section and name."""
    value: Any
    """What that holds."""
    said: str
    """In words; of a fault with its remedy."""


class Notes:
    """Collects findings.

    Args:
        wrong: sections that are wrong by themselves: what reads them is not looked at.
    """

    def __init__(self, wrong: frozenset[str] = frozenset()) -> None:
        self.checks: list[Check] = []
        self._wrong = wrong
        self._about: tuple[str, str | None, Any] = ("", None, None)

    @contextmanager
    def about(self, check: str, field: str | None, value: Any) -> Iterator[None]:
        """Within it a check notes what it finds; the error that it raises becomes its fault."""
        self._about = check, field, value
        try:
            yield
        except NearFutureError as error:
            self.fail(str(error))

    def readable(self, check: str, *sections: str) -> bool:
        """Whether a check can be made: the sections that it reads are right. Notes it if not."""
        wrong = sorted(self._wrong & set(sections))
        if wrong:
            self._about = check, None, None
            self.unchecked(f"the section{'s' * (len(wrong) > 1)} {', '.join(wrong)} must be mended first")
        return not wrong

    def at(self, field: str | None, value: Any) -> None:
        """What follows is about this field."""
        self._about = self._about[0], field, value

    def ok(self, said: str) -> None:
        """All is well."""
        self._note("ok", said)

    def warn(self, said: str) -> None:
        """Something on this machine, or later, may stop the run."""
        self._note("warning", said)

    def unchecked(self, said: str) -> None:
        """It could not be looked at, for this reason."""
        self._note("unchecked", said)

    def fail(self, said: str) -> None:
        """The run would stop."""
        self._note("failed", said)

    def _note(self, status: Status, said: str) -> None:
        check, field, value = self._about
        self.checks.append(Check(check, status, field, value, said))

    def noted(self, check: str) -> bool:
        """Whether a check has found anything yet."""
        return any(found.check == check for found in self.checks)
