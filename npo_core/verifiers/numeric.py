"""One number, within a tolerance: |answer − reference| ≤ max(absolute, relative·|reference|)."""

from __future__ import annotations

import decimal
import re
from decimal import Decimal

from npo_core.interfaces import Verdict
from npo_core.verifiers.extract import NUMBER, final_answer
from npo_core.verifiers.judges import Judge, Question, UnusableReferenceError, compared, nothing_found
from schemas.verifier import VerifierSection

VERSION = "1"
_CONTEXT = decimal.Context(prec=60, Emax=10**15, Emin=-(10**15))
"""60 digits: what is lost is far below every tolerance but 0."""
_FRACTION = re.compile(rf"(?P<sign>[-+]?)\\[dt]?frac\{{(?P<up>{NUMBER.pattern})\}}\{{(?P<down>{NUMBER.pattern})\}}")
_RATIO = re.compile(rf"(?<![0-9])(?P<up>{NUMBER.pattern}) ?/ ?(?P<down>{NUMBER.pattern})")


def build(section: VerifierSection) -> Judge:
    """See `Judge`."""
    relative, absolute = Decimal(section.tolerance.relative), Decimal(section.tolerance.absolute)

    def judge(question: Question) -> Verdict:
        want = number(question.answer)
        if want is None:
            raise UnusableReferenceError("it is not one number")
        found = final_answer(question.text, section.extract, numbers=True)
        got = None if found is None else number(found)
        if found is None or got is None:
            return nothing_found(question.answer)
        with decimal.localcontext(_CONTEXT):
            near = got == want or abs(got - want) <= max(absolute, relative * abs(want))
        return compared(near, found, question.answer)

    return judge


def number(text: str) -> Decimal | None:
    """The one number in a text: decimal, p/q or `\\frac{p}{q}`; what stands around it may be a unit. None if there is
    none, or more than one."""
    text = re.sub(r"\\[,!;: ]|\{,\}", lambda found: "," if found.group() == "{,}" else "", text).replace("−", "-")
    for form in (_FRACTION, _RATIO, NUMBER):
        found = list(form.finditer(text))
        if len(found) > 1:
            return None
        if found:
            return None if NUMBER.search(text[: found[0].start()] + " " + text[found[0].end() :]) else _value(found[0])
    return None


def _value(found: re.Match[str]) -> Decimal | None:
    parts = found.groupdict()
    try:
        with decimal.localcontext(_CONTEXT):
            if not parts:
                return _decimal(found.group())
            ratio = _decimal(parts["up"]) / _decimal(parts["down"])
            return -ratio if parts.get("sign") == "-" else ratio
    except (decimal.DecimalException, ValueError):
        return None  # x/0, or an exponent beyond all bounds


def _decimal(text: str) -> Decimal:
    # Unary plus rounds to the context.
    return +Decimal(text.replace(",", ""))
