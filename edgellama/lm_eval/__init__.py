"""Likelihoods of texts, and lm-evaluation-harness on a bundle's artifact: `python -m edgellama.lm_eval`.

Importing this package registers the model `edgellama`, and has its class `EdgellamaLM`, if the harness is
installed. Likelihoods need no harness.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("lm_eval") is not None:
    from edgellama.lm_eval.model import EdgellamaLM as EdgellamaLM
