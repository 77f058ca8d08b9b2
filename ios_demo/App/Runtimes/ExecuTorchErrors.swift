import EdgeLlamaCore
import Foundation

/// Error codes of ExecuTorch (runtime/core/error.h) as sentences.
enum ExecuTorchErrors {
    /// The version that the project's package is pinned to, and that exports: the two must agree.
    static let version: String = "1.5.1"

    private static let export: String = "Export the bundle with ExecuTorch \(version), which this app has."
    private static let copy: String = "Copy the bundle to the device again."
    private static let memory: String = "Close other apps, or use a smaller model or a shorter context."

    private static let sentences: [Int: (reason: String, remedy: String)] = [
        0x02: ("the model is in a state in which this cannot be done", "Close the model and load it again."),
        0x10: ("this build does not support what the model asks for", export),
        0x11: ("the model uses something that is not implemented", export),
        0x12: ("the model refused its inputs", export),
        0x13: ("the model got inputs of another type", export),
        0x14: ("an operator of the model is missing in this app", "Link the package's kernels with -all_load."),
        0x20: ("a file, a method or a backend was not found", copy),
        0x21: ("there is not enough memory", memory),
        0x22: ("the model's file cannot be read", copy),
        0x23: ("the file is no program of this version of ExecuTorch", export),
        0x24: ("data beside the program is damaged", copy),
        0x25: ("there is not enough memory", memory),
        0x30: ("the delegate in the file is of another version", export),
        0x31: ("there is not enough memory for the delegate", memory),
        0x32: ("the delegate is not in this app", "Link backend_xnnpack and backend_coreml with -all_load."),
    ]

    /// Runs `work`; what ExecuTorch throws becomes a sentence and what to do about it.
    static func translated<T>(_ action: String, _ work: () throws -> T) throws -> T {
        do {
            return try work()
        } catch let error as EdgeLlamaError {
            throw error
        } catch {
            let code: Int = (error as NSError).code
            let known: (reason: String, remedy: String) =
                sentences[code] ?? ("it failed for a reason of its own", export)
            let number: String = "0x" + String(code, radix: 16)
            throw EdgeLlamaError(
                .model, "ExecuTorch cannot \(action): \(known.reason) (error \(number))", remedy: known.remedy
            )
        }
    }

    static func unexpected(_ what: String) -> EdgeLlamaError {
        EdgeLlamaError(.model, "the model \(what)", remedy: export)
    }
}
