#if canImport(ExecuTorch)
import EdgeLlamaCore
import ExecuTorch
import Foundation

/// A .pte of target `xnnpack`: forward(tokens int64 [1, T], input_pos int64 [1]) -> logits float32 [1, V]. V
/// is the size of the vocabulary, or the number of rows of a classifier's labels.
///
/// `Module` is used and not ExecuTorch's text runner, which has a tokenizer and a sampler of its own and gives no logits.
final class ExecuTorchModel: LogitsModel, @unchecked Sendable {
    let vocabSize: Int
    let outputSize: Int
    let contextLength: Int
    let runtime: String = "executorch \(ExecuTorchErrors.version) xnnpack"
    private let module: Module

    init(file: URL) throws {
        let module: Module = Module(filePath: file.path, loadMode: .mmap)
        vocabSize = try module.constant("get_vocab_size")
        contextLength = try module.constant("get_max_context_len")
        outputSize = try module.outputSize("forward")
        self.module = module
        _ = try forward([0], at: 0)  // packs the weights, which belongs to loading
    }

    func forward(_ tokens: [Int], at position: Int) throws -> [Float] {
        try ExecuTorchErrors.translated("run it") {
            let ids: Tensor<Int64> = Tensor<Int64>(tokens.map { Int64($0) }, shape: [1, tokens.count])
            let at: Tensor<Int64> = Tensor<Int64>([Int64(position)], shape: [1])
            let inputs: [any ValueConvertible] = [ids, at]
            let outputs: [Value] = try module.execute("forward", inputs)
            guard let logits: Tensor<Float> = outputs.first?.tensor(), logits.count == outputSize else {
                throw ExecuTorchErrors.unexpected("did not give \(outputSize) logits")
            }
            return logits.scalars()
        }
    }
}

extension Module {
    /// Number of logits of a position that `method` gives, loading it first.
    func outputSize(_ method: String) throws -> Int {
        try ExecuTorchErrors.translated("load \(method)") {
            try load(method)
            let outputs: [Int: TensorMetadata] = try methodMetadata(method).outputTensorMetadata
            guard let size: Int = outputs[0]?.shape.last else { throw ExecuTorchErrors.unexpected("has no logits") }
            return size
        }
    }

    /// What a method without inputs, such as `get_vocab_size`, says.
    func constant(_ method: String) throws -> Int {
        try ExecuTorchErrors.translated("read \(method)") {
            let inputs: [any ValueConvertible] = []
            let outputs: [Value] = try execute(method, inputs)
            guard let number: NSNumber = outputs.first?.scalar else {
                throw ExecuTorchErrors.unexpected("has no number \(method)")
            }
            return number.intValue
        }
    }
}
#endif
