#if canImport(CoreML)
import CoreML
import Foundation

/// Where Core ML computes. The profile of a package says which it was made for: `gpu` or `ane`.
public enum CoreMLUnits: String, CaseIterable, Sendable {
    case cpuAndGPU
    case cpuAndNeuralEngine
    case cpuOnly
    case all

    var units: MLComputeUnits {
        switch self {
        case .cpuAndGPU: return .cpuAndGPU
        case .cpuAndNeuralEngine: return .cpuAndNeuralEngine
        case .cpuOnly: return .cpuOnly
        case .all: return .all
        }
    }
}

/// A .mlpackage in Core ML, with its KV cache as a state: one function of flexible shapes, or `decode` and `prefill`.
public final class CoreMLModel: LogitsModel, @unchecked Sendable {
    public let vocabSize: Int
    public let outputSize: Int
    public let contextLength: Int
    public let runtime: String

    /// The flexible function, or `decode`.
    private let single: MLModel
    /// `prefill`, and how many tokens a call of it takes.
    private let prefill: (model: MLModel, tokens: Int)?
    private let state: MLState

    /// Loads the verified package at `package`. What Core ML compiles is kept in `cache` under the artifact's hash.
    public static func load(
        package: URL, sha256: String, cache: URL, units: CoreMLUnits
    ) async throws -> CoreMLModel {
        do {
            let compiled: URL = try await compiledModel(package: package, sha256: sha256, cache: cache)
            let names: [String] = try await functions(compiled)
            let isStatic: Bool = names.contains(CoreMLInterface.decode)
            let single: MLModel = try await model(compiled, isStatic ? CoreMLInterface.decode : nil, units)
            let prefill: MLModel? = isStatic ? try await model(compiled, CoreMLInterface.prefill, units) : nil
            return try CoreMLModel(single: single, prefill: prefill, units: units)
        } catch let error as EdgeLlamaError {
            throw error
        } catch {
            throw failed("load it", error)
        }
    }

    private static func compiledModel(package: URL, sha256: String, cache: URL) async throws -> URL {
        let kept: URL = cache.appendingPathComponent("\(sha256).mlmodelc", isDirectory: true)
        let files: FileManager = FileManager.default
        if files.fileExists(atPath: kept.path) { return kept }
        try files.createDirectory(at: cache, withIntermediateDirectories: true)
        let compiled: URL = try await MLModel.compileModel(at: package)
        try? files.removeItem(at: kept)
        try files.moveItem(at: compiled, to: kept)
        return kept
    }

    private static func functions(_ compiled: URL) async throws -> [String] {
        let asset: MLModelAsset = try MLModelAsset(url: compiled)
        return try await asset.functionNames
    }

    private static func model(_ compiled: URL, _ function: String?, _ units: CoreMLUnits) async throws -> MLModel {
        let configuration: MLModelConfiguration = MLModelConfiguration()
        configuration.computeUnits = units.units
        if let function: String = function { configuration.functionName = function }
        return try await MLModel.load(contentsOf: compiled, configuration: configuration)
    }

    private init(single: MLModel, prefill: MLModel?, units: CoreMLUnits) throws {
        let own: [String: String] =
            single.modelDescription.metadata[.creatorDefinedKey] as? [String: String] ?? [:]
        guard let vocabSize: Int = Int(own[CoreMLInterface.vocabSize] ?? ""),
            let contextLength: Int = Int(own[CoreMLInterface.contextLength] ?? ""),
            single.modelDescription.stateDescriptionsByName[CoreMLInterface.keyCache] != nil,
            single.modelDescription.stateDescriptionsByName[CoreMLInterface.valueCache] != nil
        else {
            throw EdgeLlamaError(
                .model,
                "this is not a package that edgellama wrote for language models",
                remedy: "Export the bundle again; `edgellama inspect` shows what a package holds."
            )
        }
        self.vocabSize = vocabSize
        outputSize = own[CoreMLInterface.outputSize].flatMap { Int($0) } ?? vocabSize
        self.contextLength = contextLength
        self.single = single
        if let prefill: MLModel = prefill {
            let ids: MLFeatureDescription? = prefill.modelDescription.inputDescriptionsByName[CoreMLInterface.inputIds]
            let shape: [NSNumber] = ids?.multiArrayConstraint?.shape ?? []
            guard shape.count == 2 else {
                throw EdgeLlamaError(.model, "the function prefill has no \(CoreMLInterface.inputIds)", remedy: "Export the bundle again.")
            }
            self.prefill = (prefill, shape[1].intValue)
        } else {
            self.prefill = nil
        }
        state = single.makeState()
        let version: OperatingSystemVersion = ProcessInfo.processInfo.operatingSystemVersion
        runtime = "coreml \(version.majorVersion).\(version.minorVersion) \(units.rawValue)"
    }

    public func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        let calls: [CoreMLCall] = CoreMLCall.plan(
            count: tokens.count, position: position, contextLength: contextLength, prefillTokens: prefill?.tokens
        )
        var logits: [Float] = []
        for call in calls {
            let start: Int = call.position - position
            logits = try run(call, Array(tokens[start..<start + call.count]))
        }
        return logits
    }

    /// The logits after the last of `tokens`.
    private func run(_ call: CoreMLCall, _ tokens: [Int]) throws -> [Float] {
        let width: Int = prefill == nil ? call.position + call.count : contextLength
        let mask: [UInt16] = CoreMLInterface.causalMask(
            rows: call.rows, width: width, position: call.position, own: call.position
        )
        do {
            var inputs: [String: MLFeatureValue] = [
                CoreMLInterface.inputIds: try CoreMLModel.int32(
                    tokens + [Int](repeating: 0, count: call.rows - tokens.count), shape: [1, call.rows]
                ),
                CoreMLInterface.mask: try CoreMLModel.float16(mask, shape: [1, 1, call.rows, width]),
            ]
            if prefill != nil {
                inputs[CoreMLInterface.position] = try CoreMLModel.int32([call.position], shape: [1])
            }
            let provider: MLDictionaryFeatureProvider = try MLDictionaryFeatureProvider(dictionary: inputs)
            let model: MLModel = call.isPrefill ? prefill?.model ?? single : single
            let outputs: any MLFeatureProvider = try model.prediction(from: provider, using: state)
            guard let logits: MLMultiArray = outputs.featureValue(for: CoreMLInterface.logits)?.multiArrayValue else {
                throw EdgeLlamaError(.model, "the model gave no \(CoreMLInterface.logits)", remedy: "Export the bundle again.")
            }
            return try row(call.count - 1, of: logits)
        } catch let error as EdgeLlamaError {
            throw error
        } catch {
            throw CoreMLModel.failed("run it", error)
        }
    }

    private static func int32(_ values: [Int], shape: [Int]) throws -> MLFeatureValue {
        let array: MLMultiArray = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .int32)
        array.withUnsafeMutableBytes { (bytes: UnsafeMutableRawBufferPointer, _: [Int]) in
            for (index, value) in values.enumerated() {
                bytes.storeBytes(of: Int32(truncatingIfNeeded: value), toByteOffset: 4 * index, as: Int32.self)
            }
        }
        return MLFeatureValue(multiArray: array)
    }

    private static func float16(_ bits: [UInt16], shape: [Int]) throws -> MLFeatureValue {
        let array: MLMultiArray = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float16)
        array.withUnsafeMutableBytes { (bytes: UnsafeMutableRawBufferPointer, _: [Int]) in
            bits.withUnsafeBytes { bytes.copyMemory(from: $0) }
        }
        return MLFeatureValue(multiArray: array)
    }

    /// Row `row` of logits [1, T, outputSize], whose rows need not lie one after the other.
    private func row(_ row: Int, of logits: MLMultiArray) throws -> [Float] {
        guard logits.dataType == .float16, logits.shape.count == 3, logits.shape[1].intValue > row,
            logits.shape[2].intValue == outputSize
        else {
            throw EdgeLlamaError(
                .model,
                "\(CoreMLInterface.logits) has the shape \(logits.shape) for \(outputSize) logits of a position",
                remedy: "Export the bundle again."
            )
        }
        let start: Int = row * logits.strides[1].intValue
        let step: Int = logits.strides[2].intValue
        let count: Int = outputSize
        return logits.withUnsafeBytes { (bytes: UnsafeRawBufferPointer) -> [Float] in
            (0..<count).map { (id: Int) -> Float in
                CoreMLInterface.float(bytes.load(fromByteOffset: 2 * (start + id * step), as: UInt16.self))
            }
        }
    }

    private static func failed(_ action: String, _ error: any Error) -> EdgeLlamaError {
        EdgeLlamaError(
            .model,
            "Core ML cannot \(action): \(error.localizedDescription)",
            remedy: "Try other compute units, close other apps, or export again for this device's system."
        )
    }
}
#endif
