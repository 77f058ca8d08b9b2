"""Kernels that computed an artifact on an emulated processor, and the way that they rounded.

A fallback to a slow kernel, or to one that rounds otherwise than the golden vectors, is found although the logits
alone would not show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellama.bundle import Bundle
from edgellama.emulator.installed import Emulator
from edgellama.emulator.kernels import Kernels
from edgellama.emulator.processors import Processor
from edgellama.errors import BundleError
from edgellama.files import read_json
from edgellama.model.schemes import module_shapes
from edgellama.report import Check, check
from edgellama.targets import find_target
from edgellama.targets.families import ARM, ARM_DOTPROD
from edgellama.targets.onnx.interface import GENAI_FILE


def rounding_probe(bundle: Bundle, target: str, directory: Path) -> Path | None:
    """Writes the probe of rounding, for a model with products of int4 in ONNX Runtime."""
    if target != "onnx" or bundle.recipe.onnx_form != "ort" or 4 not in linear_bits(bundle):
        return None
    with find_target(target).needs_extra():
        from edgellama.targets.onnx.rounding_probe import write_probe

        write_probe(directory)
    return directory


def kind_of(processor: Processor) -> str:
    """Kind of an emulated processor (edgellama.targets.families)."""
    return ARM_DOTPROD if processor.products else ARM


def check_rounding(processor: Processor, results: Sequence[Any], family: str | None) -> Check:
    """Check that ONNX Runtime rounds the inputs of int4 products as the golden vectors of this processor do.

    Args:
        processor: the processor.
        results: of the probe, see `runtimes/emulated_worker`.
        family: name of the rounding whose rows the run was compared with. None for an older bundle, whose rows are
            those of a machine that rounds per block.
    """
    from edgellama.targets.onnx.families import FLOAT, PER_BLOCK
    from edgellama.targets.onnx.rounding_probe import rounding_of

    expected = family or (PER_BLOCK if processor.products else FLOAT)
    actual = [rounding_of(np.array(result, np.float32)) for result in results]
    return check(
        f"emulated.{processor.name}.rounding",
        set(actual) == {expected},
        value=actual[0],
        limit=expected,
        detail=f"prefill {actual[0]}, decode {actual[1]}, by the session entries of {GENAI_FILE}",
    )


def client_entries(path: Path) -> list[str]:
    """Session entries, `NAME=VALUE`, in the configuration that clients of the ONNX artifact at `path` read.

    Raises BundleError for a file of another form.
    """
    file = path / GENAI_FILE
    try:
        options = read_json(file)["model"]["decoder"]["session_options"]
        entries = [(name, value) for name, value in options.items() if "." in name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{file}: no configuration of onnxruntime-genai ({error})", remedy="Export the bundle again."
        ) from error
    return [f"{name}={value}" for name, value in entries if isinstance(value, str)]


def label(processor: Processor, emulator: Emulator, kernels: Kernels) -> str:
    """Name of a run for people: `emulated cortex-a76, qemu 10.0.13, KleidiAI dotprod`."""
    family = "KleidiAI" if any(name.startswith("kai_") for name in kernels.names) else "MLAS"
    products = _product_set(kernels)
    return f"emulated {processor.name}, qemu {emulator.qemu}, {family} {products or 'float'}"


def _product_set(kernels: Kernels) -> str | None:
    """The newest instruction set among the products of int8 that ran; None if none ran."""
    sets = (("sme", "mopa"), ("i8mm", "mmla"), ("i8mm", "usdot"), ("dotprod", "dot"))
    return next(
        (name for name, ending in sets if any(product.endswith(ending) for product in kernels.integer)), None
    )


def check_kernels(bundle: Bundle, target: str, processor: Processor, kernels: Kernels) -> Check:
    """Check that fast kernels computed the quantized linears.

    For a .pte every kind of quantized weight must have a kernel of KleidiAI that ran. For ONNX, whose library
    has no symbols, products of int8 must have run. A processor without dotprod computes in float.
    """
    name = f"emulated.{processor.name}.kernels"
    bits = linear_bits(bundle)
    if not bits:
        return check(name, True, detail="the recipe quantizes nothing")
    if not processor.products:
        return check(name, True, detail=f"{processor.name} has no products of int8")
    products = _product_set(kernels)
    if target == "onnx":
        return check(
            name, products is not None, value=products or "float", detail=", ".join(kernels.products)
        )
    missing = [f"int{b}" for b in sorted(bits) if not any(f"_qsi{b}c" in kernel for kernel in kernels.names)]
    fallback = [kernel for kernel in kernels.names if kernel.startswith("xnn_")]
    detail = f"no KleidiAI kernel for {', '.join(missing)} weights; ran: {', '.join(fallback) or 'none'}"
    return check(name, not missing, value=products, detail=detail if missing else f"KleidiAI {products}")


def linear_bits(bundle: Bundle) -> set[int]:
    """Bits of the quantized linears' weights, without those of the embedding."""
    config = bundle.config
    schemes = bundle.recipe.assign(module_shapes(config.tensor_shapes(), config.tie_word_embeddings))
    return {s.bits for name, s in schemes.items() if s is not None and name != "model.embed_tokens"}
