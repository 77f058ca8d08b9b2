import EdgeLlamaCore
import Foundation

/// What runs a bundle's model: a target of the bundle, and where Core ML computes.
enum Backend: String, CaseIterable, Identifiable, Sendable {
    case coremlGPU = "coreml-gpu"
    case coremlANE = "coreml-ane"
    case xnnpack = "xnnpack"
    case coremlPte = "coreml-pte"

    var id: String { rawValue }

    /// The target of the bundle that this backend runs.
    var target: String {
        switch self {
        case .coremlGPU, .coremlANE: return "coreml"
        case .xnnpack: return "xnnpack"
        case .coremlPte: return "coreml-pte"
        }
    }

    var label: String {
        switch self {
        case .coremlGPU: return "Core ML, GPU"
        case .coremlANE: return "Core ML, Neural Engine"
        case .xnnpack: return "ExecuTorch, XNNPACK (CPU)"
        case .coremlPte: return "ExecuTorch, Core ML"
        }
    }

    /// The backends that a bundle has an artifact for, the one that its package is arranged for first.
    static func all(of bundle: ModelBundle) -> [Backend] {
        let targets: Set<String> = Set(bundle.artifacts.map { $0.target })
        let order: [Backend] = bundle.coremlProfile == "ane"
            ? [.coremlANE, .coremlGPU, .xnnpack, .coremlPte] : [.coremlGPU, .coremlANE, .xnnpack, .coremlPte]
        return order.filter { targets.contains($0.target) }
    }

    /// Why this backend will be slow with `bundle`; nil when it will not.
    func warning(_ bundle: ModelBundle) -> String? {
        switch (self, bundle.coremlProfile) {
        case (.coremlANE, "gpu"):
            return "This package is arranged for the GPU. The Neural Engine does not run flexible shapes or weights in "
                + "groups; Core ML will use the CPU. Export with -r int8-ane."
        case (.coremlGPU, "ane"):
            return "This package is arranged for the Neural Engine."
        default:
            return nil
        }
    }

    /// Opens the verified artifact at `file`.
    func open(_ file: URL, sha256: String) async throws -> any LogitsModel {
        switch self {
        case .coremlGPU, .coremlANE:
            #if canImport(CoreML)
            let units: CoreMLUnits = self == .coremlANE ? .cpuAndNeuralEngine : .cpuAndGPU
            return try await CoreMLModel.load(package: file, sha256: sha256, cache: Storage.compiled, units: units)
            #else
            throw Backend.missing("Core ML")
            #endif
        case .xnnpack:
            #if canImport(ExecuTorch)
            return try ExecuTorchModel(file: file)
            #else
            throw Backend.missing("ExecuTorch")
            #endif
        case .coremlPte:
            #if canImport(ExecuTorch)
            return try ExecuTorchCacheModel(file: file)
            #else
            throw Backend.missing("ExecuTorch")
            #endif
        }
    }

    private static func missing(_ name: String) -> EdgeLlamaError {
        EdgeLlamaError(.model, "this app was built without \(name)", remedy: "Add its package to the project and build again.")
    }
}
