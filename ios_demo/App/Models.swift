import EdgeLlamaCore
import Foundation

/// A bundle whose model is loaded.
struct Loaded: Sendable {
    let directory: URL
    let backend: Backend
    let bundle: ModelBundle
    let tokenizer: Tokenizer
    let session: Session
    let loadMillis: Double
}

/// The model in memory: one at a time, loaded when it is first needed.
@MainActor
final class Models {
    static let shared: Models = Models()

    /// Where every model runs.
    let worker: Worker = Worker()
    private var loaded: Loaded?
    private var loading: Task<Loaded, any Error>?

    /// The model of the bundle at `directory`, its files verified. `onStep` hears what is being done.
    func load(_ directory: URL, _ backend: Backend, onStep: @escaping @MainActor (String) -> Void) async throws -> Loaded {
        while let running: Task<Loaded, any Error> = loading { _ = try? await running.value }
        if let loaded: Loaded = loaded, loaded.directory == directory, loaded.backend == backend { return loaded }
        loaded = nil
        let task: Task<Loaded, any Error> = Task {
            defer { loading = nil }
            let opened: Loaded = try await open(directory, backend, onStep)
            loaded = opened
            return opened
        }
        loading = task
        return try await task.value
    }

    /// Gives the memory back, as soon as nothing runs.
    func release() {
        loaded = nil
    }

    private func open(
        _ directory: URL, _ backend: Backend, _ onStep: @MainActor (String) -> Void
    ) async throws -> Loaded {
        onStep("Verifying the files…")
        let target: String = backend.target
        let verified: (bundle: ModelBundle, file: URL, tokenizer: Tokenizer) = try await worker.run {
            let bundle: ModelBundle = try Storage.bundle(directory)
            return (bundle, try bundle.artifactFile(target), try bundle.tokenizer())
        }
        onStep("Loading the model…")
        let start: UInt64 = NanoClock.system.nanos()
        let sha256: String = try verified.bundle.artifactSha256(target)
        let model: any LogitsModel = try await Models.openModel(backend, verified.file, sha256)
        let millis: Double = Double(NanoClock.system.nanos() - start) / 1e6
        let bundle: ModelBundle = verified.bundle
        if model.vocabSize != bundle.vocabSize || model.outputSize != bundle.outputSize
            || model.contextLength != bundle.contextLength
        {
            throw EdgeLlamaError(
                .model, "the model has another vocabulary, other outputs or another context than the manifest says",
                remedy: "Copy the whole bundle again, or export it again."
            )
        }
        try Storage.loaded(verified.bundle)
        return Loaded(
            directory: directory, backend: backend, bundle: verified.bundle, tokenizer: verified.tokenizer,
            session: Session(model), loadMillis: millis
        )
    }

    /// Off the main thread: opening takes seconds.
    private nonisolated static func openModel(
        _ backend: Backend, _ file: URL, _ sha256: String
    ) async throws -> any LogitsModel {
        try await backend.open(file, sha256: sha256)
    }
}
