"""Codes of a checkpoint, by module, and their origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgellama.errors import CheckpointError
from edgellama.model.quantized import Codes
from edgellama.recipe import Scheme

_DAMAGED = "The file is damaged; download it again, or quantize the model again."


@dataclass(frozen=True)
class Origin:
    """Maker of the codes, in the words of the checkpoint.

    Attributes:
        method: `GPTQ`, `AWQ`, `AutoRound`, `compressed-tensors` or `GGUF`.
        package: package and version that wrote the file; None if it does not say.
        layout: arrangement of the codes in the file, such as `gptq`, `gptq_v2`, `awq` or `Q4_0`.
        act_order: True if columns were quantized in the order of their activations. Their groups are still
            consecutive, or the checkpoint would be refused.

    >>> Origin("GPTQ", "gptqmodel 4.0.0", "gptq").describe()
    'GPTQ (gptqmodel 4.0.0), layout gptq'
    """

    method: str
    package: str | None
    layout: str
    act_order: bool = False

    def describe(self) -> str:
        """One line for reports and notes."""
        package = f" ({self.package})" if self.package else ""
        return f"{self.method}{package}, layout {self.layout}" + (", act order" if self.act_order else "")


@dataclass(frozen=True)
class Given:
    """Weights of a checkpoint that are codes already.

    Attributes:
        origin: maker of the codes.
        schemes: bits and group size of each module with codes, by name.
        unpack: returns the codes of a module; rows and columns are those of Hugging Face's weight.
        raw: returns the tensors of a module as the file stores them, by the last part of their names.
        requires_as_is: True if the checkpoint is refused without recipe `as-is`. A GGUF file is not: it counts as the
            full-precision model after it was dequantized.
    """

    origin: Origin
    schemes: Mapping[str, Scheme]
    unpack: Callable[[str], Codes] = field(repr=False)
    raw: Callable[[str], Mapping[str, Tensor]] = field(repr=False)
    requires_as_is: bool

    def codes(self, module: str) -> Codes:
        """Codes of a module, with scales as float32 numbers, exactly those of the file.

        Raises CheckpointError for a scale that is NaN or infinite.
        """
        codes = self.unpack(module)
        bad = int((~torch.isfinite(codes.scales)).sum())
        if bad:
            raise CheckpointError(f"{module}: {bad} scales are NaN or infinite", remedy=_DAMAGED)
        return codes

    def weight(self, name: str) -> Tensor | None:
        """Dequantized weight of a tensor's name, float32 [rows, columns]; None if it has no codes."""
        module = name.removesuffix(".weight")
        return self.codes(module).dequantize() if module in self.schemes else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the origin, and the modules with codes by their bits and group size."""
        forms = Counter((s.bits, s.group_size) for s in self.schemes.values())
        return {
            **asdict(self.origin),
            "symmetric": True,
            "modules": [
                {"bits": bits, "group_size": group, "modules": count}
                for (bits, group), count in sorted(forms.items(), key=lambda form: -form[1])
            ],
        }

    def describe(self) -> str:
        """One sentence about the codes, such as `GPTQ (auto-gptq), layout gptq: int4 g128 in 112 modules`."""
        forms = Counter(s.describe().removesuffix(" a8") for s in self.schemes.values())
        listed = ", ".join(f"{form} in {count} modules" for form, count in forms.most_common())
        return f"{self.origin.describe()}: {listed}"
