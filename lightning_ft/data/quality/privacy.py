"""Personal data in texts: found by patterns, and by check digits where there are some.

| kind | what | told apart from other numbers by |
|---|---|---|
| URL | http://, https://, www. | |
| EMAIL | name@host.tld | |
| FILE | a name or a path with a known ending (.pdf, .docx, .jpg, …) | |
| IBAN | two letters, two digits, 11 to 30 more | remainder 1 on division by 97 (ISO 13616) |
| ID | Chinese resident id; US social security number | date of birth, check digit (GB 11643); groups never given |
| CARD | 13 to 19 digits | Luhn's sum (ISO/IEC 7812-1), the issuers' first digits and lengths |
| PHONE | +44 20 7946 0958; (555) 234-5678; 138 1234 5678; 010-62345678; a number after "phone:" | the forms alone |

Prices, versions, years, dates and measured values have other forms. Names of people, addresses and dates of birth are
not found: no pattern has them. So it is a help in de-identifying records, not a proof that they are.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from typing import Any, NamedTuple

from lightning_ft.data.quality.findings import Finding, Splits, count, excerpt, is_text, numbered

NOTED = {"URL", "FILE"}
"""What is seldom personal: a note alone."""


class Pattern(NamedTuple):
    """What personal data of a kind look like.

    Attributes:
        kind: what stands in its place when it's taken out, in brackets.
        form: its form; where it has a group ``it``, which is last, that alone.
        holds: whether what has the form is it.
    """

    kind: str
    form: re.Pattern[str]
    holds: Callable[[str], bool] = bool


def redact(text: str) -> tuple[str, Counter[str]]:
    """The text with its personal data replaced by ``[EMAIL]``, ``[PHONE]``, …; and how many there were of each."""
    found: Counter[str] = Counter()

    for pattern in PATTERNS:

        def replaced(match: re.Match[str], pattern: Pattern = pattern) -> str:
            it = match["it"] if "it" in pattern.form.groupindex else match[0]
            if not pattern.holds(it):
                return match[0]
            found[pattern.kind] += 1
            return match[0].removesuffix(it) + f"[{pattern.kind}]"

        text = pattern.form.sub(replaced, text)
    return text, found


def personal_data(splits: Splits) -> Iterator[Finding]:
    """Rows with personal data in their text, or in a label that is a text of its own, by kind."""
    for split, data in splits.items():
        rows: dict[str, list[int]] = defaultdict(list)
        examples: dict[str, list[str]] = defaultdict(list)
        for i, text in data.written():
            shown, kinds = redact(text)
            for kind in kinds:
                rows[kind].append(i + 1)  # twice, where text and label have some
                examples[kind].append(f"row {i + 1}: {_around(shown, kind)}")
        for kind in dict.fromkeys(pattern.kind for pattern in PATTERNS if pattern.kind in rows):
            its = tuple(sorted(set(rows[kind])))
            message = f"{count(len(its))} with {_WORDS[kind]}: {numbered(its)}."
            message += " check.fix=FOLDER writes a copy without."
            severity = "note" if kind in NOTED else "warning"
            yield Finding("personal_data", severity, split, its, message, tuple(examples[kind][:3]))  # type: ignore[arg-type]


def redacted(values: Iterable[Any]) -> tuple[dict[int, str], Counter[str]]:
    """The texts that change by :func:`redact`, by their index, and how many of each kind there were."""
    changed: dict[int, str] = {}
    found: Counter[str] = Counter()
    for i, value in enumerate(values):
        shown, kinds = redact(value) if is_text(value) else ("", Counter())
        if kinds:
            changed[i] = shown
            found += kinds
    return changed, found


def luhn(digits: str) -> bool:
    """Whether the sum of the digits, every second from the right doubled (and 9 taken off above 9), ends in 0."""
    values = [int(digit) for digit in reversed(digits)]
    doubled = [2 * value - 9 * (value > 4) for value in values[1::2]]
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


def is_card(text: str) -> bool:
    """Whether it's the number of a card: an issuer's first digits and length, and Luhn's sum."""
    digits = re.sub(r"\D", "", text)
    return bool(_ISSUERS.fullmatch(digits)) and luhn(digits)


def is_iban(text: str) -> bool:
    """Whether the first four characters put last, letters as 10 to 35, leave 1 when divided by 97."""
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def is_chinese_id(text: str) -> bool:
    """Whether it holds a date of birth, and Σ 2^(17-i) dᵢ over all 18 leaves 1 when divided by 11; X stands for 10."""
    try:
        date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    values = [10 if digit in "xX" else int(digit) for digit in text]
    return sum(value * 2 ** (17 - i) for i, value in enumerate(values)) % 11 == 1


def is_phone(text: str) -> bool:
    """Whether it has as many digits as a phone number, and isn't a span of years or a date."""
    digits = re.sub(r"\D", "", text)
    years = re.search(r"(?:19|20)\d\d\s?[-/.–]\s?(?:(?:19|20)\d\d|\d\d?[-/.]\d\d?)(?!\d)", text)
    return 7 <= len(digits) <= 15 and not years and len(set(digits)) > 2


# Neither within a longer number nor behind a currency, a decimal point or a letter. Not \w, which has Chinese
# characters, between which and a number there is no space.
_ALONE, _ENDS = r"(?<![A-Za-z0-9.,$€£¥/+#-])", r"(?![A-Za-z0-9%/]|[.,-]\d)"

_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}"  # Discover
    r"|62\d{14,17}"  # UnionPay
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|3(?:0[0-5]|[68]\d)\d{11}"  # Diners
)
_END = r"(?![A-Za-z0-9])"
_ENDINGS = (
    "pdf|docx?|xlsx?|pptx?|odt|rtf|txt|csv|tsv|json|xml|jpe?g|png|gif|tiff?|bmp|heic|dcm|zip|rar|7z|eml|msg|mp3|mp4|wav"
)

_CUE = (
    r"(?:(?<![A-Za-z])(?:(?:tele|cell)?phone|tel|mobile|cell|fax)(?:\.|\s*[:#]|\s+is\b|\s+(?:no|number|nr)\b(?:\.|:|\s+is)?)"
    r"|(?:电话|手机|传真)(?:号码?)?[是为]?[:：]?)\s*"
)

PATTERNS = (
    Pattern("URL", re.compile(r"(?:https?://|(?<![A-Za-z0-9])www\.)[!#-&(-;=?-~]*[A-Za-z0-9/]", re.IGNORECASE)),
    Pattern("EMAIL", re.compile(rf"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{{2,}}{_END}")),
    Pattern(
        "FILE",
        re.compile(
            rf"(?<![\w.-])(?:[A-Za-z]:[\\/]|~?/|\.\.?/)?(?:[\w.-]+[\\/])*[\w-][\w.-]*\.(?:{_ENDINGS})(?!\w|[.-]\w)",
            re.IGNORECASE,
        ),
    ),
    Pattern(
        "IBAN",
        re.compile(rf"(?<![A-Za-z0-9])[A-Z]{{2}}\d\d(?: ?[A-Z0-9]{{4}}){{2,7}}(?: ?[A-Z0-9]{{1,3}})?{_END}"),
        is_iban,
    ),
    Pattern("ID", re.compile(rf"(?<![A-Za-z0-9])[1-9]\d{{5}}(?:19|20)\d{{9}}[\dXx]{_END}"), is_chinese_id),
    Pattern("CARD", re.compile(rf"{_ALONE}\d(?:[ -]?\d){{12,18}}{_ENDS}"), is_card),
    Pattern("ID", re.compile(rf"{_ALONE}(?!000|666|9)\d{{3}}-(?!00)\d\d-(?!0000)\d{{4}}{_ENDS}")),
    *(
        Pattern("PHONE", re.compile(form, re.IGNORECASE), is_phone)
        for form in (
            rf"(?<![A-Za-z0-9.,+])\+\d{{1,3}}(?:[ .-]?(?:\(\d{{1,5}}\)|\d{{1,5}})){{2,6}}{_ENDS}",  # any country
            rf"{_ALONE}1[3-9]\d([ -]?)\d{{4}}\1\d{{4}}{_ENDS}",  # China, mobile
            rf"(?:\([2-9]\d\d\) ?|{_ALONE}(?:1[ .-])?[2-9]\d\d[-.])[2-9]\d\d[-. ]\d{{4}}{_ENDS}",  # North America
            rf"{_ALONE}(?:\(0[1-9]\d{{1,3}}\)|0[1-9]\d{{1,3}})[ /-]\d{{3,4}}[ -]?\d{{3,4}}{_ENDS}",  # with an area code
            rf"{_CUE}(?P<it>\d[\d ().-]{{5,16}}\d){_ENDS}",
        )
    ),
)
"""In this order; what one has found, the next ones don't see."""

_WORDS = {
    "URL": "a link",
    "EMAIL": "an e-mail address",
    "FILE": "the name of a file",
    "IBAN": "an IBAN",
    "ID": "a national id",
    "CARD": "the number of a card",
    "PHONE": "a phone number",
}


def _around(shown: str, kind: str) -> str:
    """What stands around the first of a kind."""
    at = shown.index(f"[{kind}]")
    return ("…" if at > 40 else "") + excerpt(shown[max(0, at - 40) :])
