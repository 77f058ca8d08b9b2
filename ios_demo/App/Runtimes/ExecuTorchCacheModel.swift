#if canImport(ExecuTorch)
import EdgeLlamaCore
import ExecuTorch
import Foundation

/// A .pte of target `coreml-pte`: methods `forward` (one token) and `prefill`, whose KV cache goes in and whose new rows
/// come out, because states do not work inside a .pte.
///
/// Inputs in order: inputIds int32 [1, T], causalMask float16 [1, 1, T, S + T], position int32 [1], keyCache and
/// valueCache float16 [L, 1, G, S, D]. Outputs: logits float16 [1, T, V], newKeys and newValues float16 [L, 1, G, T, D].
/// Float16 goes as bits. V is the size of the vocabulary, or the number of rows of a classifier's labels.
final class ExecuTorchCacheModel: LogitsModel, @unchecked Sendable {
    let vocabSize: Int
    let outputSize: Int
    let contextLength: Int
    let runtime: String = "executorch \(ExecuTorchErrors.version) coreml"
    private let module: Module
    private let prefillTokens: Int
    /// [L, 1, G, S, D].
    private let cacheShape: [Int]
    private var keys: [UInt16]
    private var values: [UInt16]

    init(file: URL) throws {
        let module: Module = Module(filePath: file.path, loadMode: .mmap)
        vocabSize = try module.constant("get_vocab_size")
        contextLength = try module.constant("get_max_context_len")
        outputSize = try module.outputSize(CoreMLInterface.forward)
        prefillTokens = try module.constant(CoreMLInterface.prefillTokensMethod)
        let shape: [Int] = try ExecuTorchErrors.translated("load it") {
            try module.load(CoreMLInterface.prefill)
            let inputs: [Int: TensorMetadata] = try module.methodMetadata(CoreMLInterface.forward).inputTensorMetadata
            return inputs[3]?.shape ?? []
        }
        guard shape.count == 5, shape[1] == 1, shape[3] == contextLength else {
            throw ExecuTorchErrors.unexpected("has no KV cache for \(contextLength) tokens among its inputs")
        }
        cacheShape = shape
        keys = [UInt16](repeating: 0, count: shape.reduce(1, *))
        values = keys
        self.module = module
    }

    func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        let calls: [CoreMLCall] = CoreMLCall.plan(
            count: tokens.count, position: position, contextLength: contextLength, prefillTokens: prefillTokens
        )
        var logits: [Float] = []
        for call in calls {
            let start: Int = call.position - position
            logits = try run(call, Array(tokens[start..<start + call.count]))
        }
        return logits
    }

    /// The logits after the last of `tokens`; the cache then holds them.
    private func run(_ call: CoreMLCall, _ tokens: [Int]) throws -> [Float] {
        let width: Int = contextLength + call.rows
        let mask: [UInt16] = CoreMLInterface.causalMask(
            rows: call.rows, width: width, position: call.position, own: contextLength
        )
        let ids: [Int32] = (tokens + [Int](repeating: 0, count: call.rows - tokens.count)).map { Int32($0) }
        let method: String = call.isPrefill ? CoreMLInterface.prefill : CoreMLInterface.forward
        return try ExecuTorchErrors.translated("run it") {
            let inputs: [any ValueConvertible] = [
                Tensor<Int32>(ids, shape: [1, call.rows]),
                ExecuTorchCacheModel.float16(mask, shape: [1, 1, call.rows, width]),
                Tensor<Int32>([Int32(call.position)], shape: [1]),
                ExecuTorchCacheModel.float16(keys, shape: cacheShape),
                ExecuTorchCacheModel.float16(values, shape: cacheShape),
            ]
            let outputs: [Value] = try module.execute(method, inputs)
            guard outputs.count == 3 else { throw ExecuTorchErrors.unexpected("gave \(outputs.count) outputs, not 3") }
            let all: [UInt16] = try ExecuTorchCacheModel.bits(outputs[0], count: call.rows * outputSize)
            keep(try ExecuTorchCacheModel.bits(outputs[1], count: rowsCount(call)), call, &keys)
            keep(try ExecuTorchCacheModel.bits(outputs[2], count: rowsCount(call)), call, &values)
            let last: Int = (call.count - 1) * outputSize
            return all[last..<last + outputSize].map { CoreMLInterface.float($0) }
        }
    }

    /// Elements of newKeys, and of newValues.
    private func rowsCount(_ call: CoreMLCall) -> Int {
        cacheShape[0] * cacheShape[2] * call.rows * cacheShape[4]
    }

    /// Writes the rows of the call's own tokens into the cache, for each layer and head.
    private func keep(_ rows: [UInt16], _ call: CoreMLCall, _ cache: inout [UInt16]) {
        let size: Int = cacheShape[4]
        for head in 0..<cacheShape[0] * cacheShape[2] {
            let from: Int = head * call.rows * size
            let to: Int = (head * contextLength + call.position) * size
            for i in 0..<call.count * size { cache[to + i] = rows[from + i] }
        }
    }

    private static func float16(_ bits: [UInt16], shape: [Int]) -> AnyTensor {
        bits.withUnsafeBytes { (bytes: UnsafeRawBufferPointer) -> AnyTensor in
            AnyTensor(bytes: bytes.baseAddress!, shape: shape, dataType: .half)
        }
    }

    private static func bits(_ value: Value, count: Int) throws -> [UInt16] {
        guard let tensor: AnyTensor = value.anyTensor, tensor.dataType == .half, tensor.count == count else {
            throw ExecuTorchErrors.unexpected("gave an output that is not float16 of \(count) elements")
        }
        var bits: [UInt16] = []
        tensor.bytes { (pointer: UnsafeRawPointer, elements: Int, _: DataType) in
            bits = Array(UnsafeBufferPointer(start: pointer.assumingMemoryBound(to: UInt16.self), count: elements))
        }
        return bits
    }
}
#endif
