"""Text of the gate: evaluation texts that the model was not calibrated on."""

from __future__ import annotations

from collections.abc import Sequence

from edgellama.bundle import Bundle
from edgellama.bundle.reports import calibration_prints
from edgellama.gate.subject import Section
from edgellama.report import check
from edgellama.text.calibration import refuse_calibration_texts
from edgellama.text.windows import Text


def examine_texts(bundle: Bundle, texts: Sequence[Text]) -> Section:
    """The check `text.calibration`, which a calibrated bundle has: its record names the calibration texts.

    Raises TextError for an evaluation text that overlaps with a calibration text.
    """
    recorded = calibration_prints(bundle)
    refuse_calibration_texts(texts, recorded or ())
    if not bundle.recipe.calibration_tokens:
        return Section()
    detail = (
        "" if recorded else "reports/export.json does not name the texts that the model was calibrated on"
    )
    return Section((check("text.calibration", bool(recorded), value=len(recorded or ()), detail=detail),))
