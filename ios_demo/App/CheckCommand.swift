import EdgeLlamaCore
import Foundation

/// The accuracy check for scripts: `--edgellama-check [BUNDLE [BACKEND]]` as arguments of a launch. With
/// `--edgellama-challenge FILE` after them, a file in Documents, that challenge is answered instead.
///
/// BUNDLE is a directory in the app's Documents or in the app (the first one, if left out), BACKEND one of
/// `coreml-gpu`, `coreml-ane`, `xnnpack`, `coreml-pte` (the first that the bundle has). The log goes to
/// Documents/results, the verdict to standard output. Exit code: 0 passed or answered, 1 failed, 2 could not be made.
struct CheckCommand: Sendable {
    static let flag: String = "--edgellama-check"
    static let challengeFlag: String = "--edgellama-challenge"

    let bundle: String?
    let backend: String?
    /// Name of a file in Documents.
    let challenge: String?

    /// Nil when the arguments ask for no check.
    init?(_ arguments: [String]) {
        guard let at: Int = arguments.firstIndex(of: CheckCommand.flag) else { return nil }
        let rest: [String] = Array(arguments[(at + 1)...].prefix { !$0.hasPrefix("-") })
        bundle = rest.first
        backend = rest.count > 1 ? rest[1] : nil
        let challengeAt: Int? = arguments.firstIndex(of: CheckCommand.challengeFlag)
        challenge = challengeAt.flatMap { $0 + 1 < arguments.count ? arguments[$0 + 1] : nil }
    }

    /// The exit code.
    @MainActor
    func run() async -> Int32 {
        do {
            let directory: URL = try found()
            let choice: Backend = try chosen(try Storage.bundle(directory))
            let screen: AccuracyScreen = AccuracyScreen(directory: directory, backend: choice)
            print("edgellama-check: \(directory.lastPathComponent), \(choice.rawValue)")
            if let challenge: String = challenge {
                await screen.answer(Storage.documents.appendingPathComponent(challenge))
            } else {
                await screen.check()
            }
            for line in screen.lines { print(line) }
            if let error: String = screen.error { print("edgellama-check: error: \(error)") }
            if challenge != nil, let file: URL = screen.file {
                print("edgellama-check: answered, Documents/results/\(file.lastPathComponent)")
                return 0
            }
            guard let result: GoldenResult = screen.result, let file: URL = screen.file else { return 2 }
            print("edgellama-check: \(result.passed ? "pass" : "fail"), Documents/results/\(file.lastPathComponent)")
            return result.passed ? 0 : 1
        } catch {
            print("edgellama-check: error: \(sentence(error))")
            return 2
        }
    }

    private func found() throws -> URL {
        let all: [URL] = Storage.bundles()
        if let match: URL = all.first(where: { bundle == nil || $0.lastPathComponent == bundle }) { return match }
        let names: String = all.map { $0.lastPathComponent }.joined(separator: ", ")
        throw EdgeLlamaError(
            .bundle, "no bundle \(bundle ?? "") on this device (there is: \(names))",
            remedy: "Copy one into the app's Documents, or build one into the app."
        )
    }

    private func chosen(_ found: ModelBundle) throws -> Backend {
        let all: [Backend] = Backend.all(of: found)
        if let match: Backend = all.first(where: { backend == nil || $0.rawValue == backend }) { return match }
        let names: String = all.map { $0.rawValue }.joined(separator: ", ")
        throw EdgeLlamaError(
            .bundle, "\(found.name) has no artifact for \(backend ?? "this app") (it has: \(names))",
            remedy: "Export the bundle with that target."
        )
    }
}
