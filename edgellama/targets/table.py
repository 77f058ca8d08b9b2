"""The targets by name."""

from __future__ import annotations

from edgellama.errors import UsageError, did_you_mean
from edgellama.targets.base import Storage, Target

_COREML = Storage(float_bytes=2, row_scale_bytes=2, tied_once=True, program=300_000, layer_program=44_000)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "xnnpack",
            "ExecuTorch .pte for the CPU of Android and iOS devices, and Linux",
            "xnnpack/model.pte",
            lower="edgellama.export.xnnpack.lower:lower_to_xnnpack",
            runtime="edgellama.runtimes.xnnpack:PteRuntime",
            structure="edgellama.targets.xnnpack.structure:check_structure",
            describe="edgellama.targets.xnnpack.describe:describe_artifact",
            stored="edgellama.targets.xnnpack.structure:stored_codes",
            numerics="edgellama.targets.xnnpack.numerics:xnnpack_numerics",
            storage=Storage(
                float_bytes=4,
                row_scale_bytes=4,
                tied_once=False,
                rope_width=1.0,
                program=16_000,
                layer_program=11_000,
            ),
            packages=("executorch",),
            rounding="edgellama.targets.xnnpack.numerics:rounding",
            kv_caches=("float", "int8"),
            options=("kv_cache",),
            assumed_floor=0.03,  # what 30 layers with int8 activations show
        ),
        Target(
            "coreml",
            "Core ML .mlpackage for iOS 18 and macOS 15, GPU or Neural Engine",
            "coreml/model.mlpackage",
            lower="edgellama.export.coreml.lower:lower_to_coreml",
            runtime="edgellama.runtimes.coreml:open_coreml",
            structure="edgellama.targets.coreml.structure:check_structure",
            describe="edgellama.targets.coreml.describe:describe_package",
            stored="edgellama.targets.coreml.structure:stored_codes",
            numerics="edgellama.targets.coreml.numerics:coreml_numerics",
            storage=_COREML,
            packages=("coremltools",),
            options=("coreml_profile",),
            parity_kl=1e-3,  # what float16 costs
            check="edgellama.targets.coreml.limits:check_profile",
        ),
        Target(
            "coreml-pte",
            "ExecuTorch .pte with the Core ML delegate, for apps on Apple devices that use ExecuTorch",
            "coreml-pte/model.pte",
            lower="edgellama.export.coreml.lower_pte:lower_to_coreml_pte",
            runtime="edgellama.runtimes.coreml:open_coreml_pte",
            structure="edgellama.targets.coreml.structure:check_pte_structure",
            describe="edgellama.targets.coreml.describe:describe_pte",
            stored="edgellama.targets.coreml.structure:stored_pte_codes",
            numerics="edgellama.targets.coreml.numerics:coreml_numerics",
            storage=_COREML,
            packages=("coremltools", "executorch"),
            options=("coreml_profile",),
            parity_kl=1e-3,
            check="edgellama.targets.coreml.limits:check_profile",
        ),
        Target(
            "onnx",
            "ONNX model for ONNX Runtime and onnxruntime-genai: Android, Windows, Linux, macOS",
            "onnx",
            lower="edgellama.export.onnx.lower:lower_to_onnx",
            runtime="edgellama.runtimes.onnx:OrtRuntime",
            structure="edgellama.targets.onnx.structure:check_structure",
            describe="edgellama.targets.onnx.describe:describe_artifact",
            stored="edgellama.targets.onnx.structure:stored_codes",
            numerics="edgellama.targets.onnx.numerics:onnx_numerics",
            storage=Storage(
                float_bytes=4,
                row_scale_bytes=4,
                tied_once=True,
                group_scale_bytes=4,
                largest_block=256,
                program=600_000,
                layer_program=7_000,
            ),
            packages=("onnx", "onnxruntime"),
            options=("onnx_form",),
            rounding="edgellama.targets.onnx.numerics:rounding",
            parity_kl=1e-3,
            assumed_floor=0.03,
            check="edgellama.targets.onnx.limits:check_blocks",
            client_files="edgellama.export.onnx.genai:write_client_files",
            extra="onnx",
        ),
    )
}


def find_target(name: str) -> Target:
    """The target of that name. Raises UsageError with the list, and the closest name."""
    if name in TARGETS:
        return TARGETS[name]
    hint = did_you_mean(name, TARGETS)
    raise UsageError(f"unknown target {name!r}", remedy=f"{hint}Targets: {', '.join(sorted(TARGETS))}.")
