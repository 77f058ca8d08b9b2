"""A guard of the tiny model: its first layer behind a chat template in the form of Llama Guard's."""

from __future__ import annotations

import json
from pathlib import Path

from edgellama.checkpoints import Checkpoint
from edgellama.text.labelled import LabelledText, LabelledTexts
from tests.helpers.tiny_classifier import evaluation_texts
from tests.helpers.tiny_models import write_hf

CONTEXT = 192
CATEGORIES = {"S1": "Theft.", "S2": "Fraud.", "S10": "Hate."}
# Contents are lists of parts, as in the template of Llama Guard 3 1B; the words are others.
TEMPLATE = """
{%- set judged = 'User' if messages | length % 2 else 'Agent' %}
{%- if categories is not defined %}
{%- set categories = dict({'S1': 'Theft.', 'S2': 'Fraud.', 'S10': 'Hate.'}) %}
{%- endif %}
{{- 'Is ' + judged + ' safe?\\n<BEGIN UNSAFE CONTENT CATEGORIES>\\n' }}
{%- for key in categories %}
{{- key + ': ' + categories[key] + '\\n' }}
{%- endfor %}
{{- '<END UNSAFE CONTENT CATEGORIES>\\n' }}
{%- for message in messages %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{{- ('User' if message['role'] == 'user' else 'Agent') + ': ' + part['text'] | trim + '\\n' }}
{%- endfor %}
{%- endfor %}
{{- judged + ' is:' }}"""
# A template with text contents and categories of its own, which no variable replaces.
FIXED = (
    "Task\n<BEGIN UNSAFE CONTENT CATEGORIES>\nS1: Theft.\nAbout things.\n<END UNSAFE CONTENT CATEGORIES>\n"
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{{ messages[-1].role + ' is:' }}\n"
)


def write_guard(tiny: Checkpoint, directory: Path, template: str = TEMPLATE) -> Path:
    """Writes the first layer of the tiny model with the template, and returns the directory."""
    write_hf(tiny.first_layers(1), directory)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def judged_texts() -> LabelledTexts:
    """Texts with labels that mean nothing, in two groups: the tiny model judges nobody."""
    rows = (row for n, row in enumerate(evaluation_texts().rows) if n % 4 < 2)
    return LabelledTexts(
        "judged",
        tuple(LabelledText(r.text, "unsafe" if r.label == "novel" else "safe", r.group) for r in rows),
    )
