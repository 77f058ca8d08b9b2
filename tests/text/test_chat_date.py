"""Dates in chat templates: given, the template's own, or today's at run time; never baked into a bundle unasked."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest

from edgellama.bundle.record import ExportRequest
from edgellama.checkpoints import open_checkpoint
from edgellama.errors import TokenizerError, UsageError
from edgellama.export.manifest import chat_section
from edgellama.runtimes.generate import chat_template
from edgellama.text.chat import ChatTemplate
from tests.helpers.odd_checkpoints import CHATML, write_checkpoint

UNASKED = "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML
ASKED = (
    "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% else %}{% set d = '26 Jul 2024' %}"
    "{% endif %}Today Date: {{ d }}\n" + CHATML
)
USER = [{"role": "user", "content": "x"}]
DAY = datetime(2026, 11, 26)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token=None, eos_token=None)


def test_a_given_date_is_written() -> None:
    assert template(UNASKED).at(DAY).render(USER).startswith("Today is 26 November 2026.\n<|im_start|>user")
    assert template(ASKED).at(DAY).render(USER).startswith("Today Date: 26 Nov 2026\n")
    assert template(ASKED).render(USER).startswith("Today Date: 26 Jul 2024\n")


def test_only_a_template_that_does_not_ask_needs_a_date() -> None:
    assert template(UNASKED).needs_date()
    assert not template(ASKED).needs_date()
    assert not template(CHATML).needs_date()


@pytest.mark.parametrize(
    ("source", "message", "remedy"),
    [
        (UNASKED, "it writes the date (strftime_now), and no date is given", "--date YYYY-MM-DD"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate", "order of roles"),
        ("{{ tools_in_user_message.x }}", "'tools_in_user_message' is undefined", "does not define"),
        ("{{ 1 // 0 }}", "division", "original chat template"),
    ],
)
def test_the_remedy_fits_the_cause(source: str, message: str, remedy: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        template(source).render(USER)
    assert message in raised.value.message and remedy in raised.value.remedy


def test_a_run_takes_today_only_if_the_template_cannot_do_without(tmp_path: Path) -> None:
    for name, source, pattern in (
        ("unasked", UNASKED, datetime.now().strftime("Today is .. %B %Y")),
        ("asked", ASKED, "Today Date: 26 Jul 2024"),
    ):
        directory = write_checkpoint(tmp_path / name, tokenizer_config={"chat_template": source})
        rendered = chat_template(open_checkpoint(directory).tokenizer).render(USER)
        assert re.match(pattern, rendered)


def test_the_manifest_holds_a_date_only_if_it_was_given(tmp_path: Path) -> None:
    unasked = open_checkpoint(write_checkpoint(tmp_path / "a", tokenizer_config={"chat_template": UNASKED}))
    chat = chat_section(unasked.tokenizer, None)
    assert chat["format"] is None and "it writes the date" in chat["reason"] and "date" not in chat
    chat = chat_section(unasked.tokenizer, "2026-11-26")
    assert chat["date"] == "2026-11-26" and chat["reason"] is None
    assert chat["format"]["no_system"].startswith("Today is 26 November 2026.")
    asked = open_checkpoint(write_checkpoint(tmp_path / "b", tokenizer_config={"chat_template": ASKED}))
    assert chat_section(asked.tokenizer, None)["format"]["no_system"].startswith("Today Date: 26 Jul 2024")


def test_a_request_takes_iso_dates_only() -> None:
    request = ExportRequest.of(recipe="int4-fast", targets=["xnnpack"], chat_date="2026-11-26")
    assert request.to_dict()["chat_date"] == "2026-11-26"
    with pytest.raises(UsageError, match=r"'26\.11\.2026' is not a date"):
        ExportRequest.of(recipe="int4-fast", targets=["xnnpack"], chat_date="26.11.2026")
