import EdgeLlamaCore
import Foundation

/// Where bundles and results lie: the app's Documents, which Files, Finder and scripts can reach.
enum Storage {
    static var documents: URL { directory(.documentDirectory) }

    /// What scripts fetch.
    static var results: URL { documents.appendingPathComponent("results", isDirectory: true) }

    /// What Core ML compiled. It can be made again, so no backup needs it.
    static var compiled: URL { directory(.cachesDirectory).appendingPathComponent("coreml", isDirectory: true) }

    private static func directory(_ kind: FileManager.SearchPathDirectory) -> URL {
        FileManager.default.urls(for: kind, in: .userDomainMask)[0]
    }

    /// Whose bundles this app loads, as Config/Settings.xcconfig says; nil for everybody's.
    private static func trust() throws -> Trust? {
        let key: String = setting("EdgeLlamaPublicKey")
        let support: URL = directory(.applicationSupportDirectory)
        let versions: FileVersions = FileVersions(support.appendingPathComponent("versions.json"))
        return try Trust(publicKey: key, versions: setting("EdgeLlamaVersionMayNotFall") == "YES" ? versions : nil)
    }

    private static func setting(_ name: String) -> String {
        Bundle.main.object(forInfoDictionaryKey: name) as? String ?? ""
    }

    /// The bundle at `directory`, of those that this app trusts.
    static func bundle(_ directory: URL) throws -> ModelBundle {
        try ModelBundle(directory, trust: try trust())
    }

    /// Notes that a bundle runs: the app may refuse older versions of it from now on.
    static func loaded(_ bundle: ModelBundle) throws {
        try trust()?.loaded(bundle)
    }

    /// Directories with a manifest: those in Documents, and what the build put into the app.
    static func bundles() -> [URL] {
        var found: [URL] = []
        for place in [documents, Bundle.main.resourceURL].compactMap({ $0 }) {
            let children: [URL]? = try? FileManager.default.contentsOfDirectory(
                at: place, includingPropertiesForKeys: nil, options: [.skipsHiddenFiles]
            )
            let bundles: [URL] = (children ?? []).filter { child in
                let manifest: URL = child.appendingPathComponent(ModelBundle.manifestName)
                return FileManager.default.fileExists(atPath: manifest.path)
            }
            found += bundles.sorted { $0.lastPathComponent < $1.lastPathComponent }
        }
        return found
    }

    /// Copies the directory that a person picked into Documents, if it is a bundle.
    static func add(_ picked: URL) throws -> URL {
        #if canImport(Darwin)
        let isScoped: Bool = picked.startAccessingSecurityScopedResource()
        defer { if isScoped { picked.stopAccessingSecurityScopedResource() } }
        #endif
        _ = try bundle(picked)
        let files: FileManager = FileManager.default
        let target: URL = documents.appendingPathComponent(picked.lastPathComponent, isDirectory: true)
        if target.standardizedFileURL == picked.standardizedFileURL { return target }
        let part: URL = documents.appendingPathComponent(".\(picked.lastPathComponent)", isDirectory: true)
        try? files.removeItem(at: part)
        defer { try? files.removeItem(at: part) }
        try files.copyItem(at: picked, to: part)
        try? files.removeItem(at: target)
        try files.moveItem(at: part, to: target)
        return target
    }

    /// The bytes of a file that a person picked, or that a script put into Documents.
    static func read(_ picked: URL) throws -> [UInt8] {
        #if canImport(Darwin)
        let isScoped: Bool = picked.startAccessingSecurityScopedResource()
        defer { if isScoped { picked.stopAccessingSecurityScopedResource() } }
        #endif
        return [UInt8](try Data(contentsOf: picked))
    }

    /// Writes a result: a whole file or none.
    @discardableResult
    static func write(_ text: String, to name: String) throws -> URL {
        try FileManager.default.createDirectory(at: results, withIntermediateDirectories: true)
        let file: URL = results.appendingPathComponent(name)
        try Data(text.utf8).write(to: file, options: .atomic)
        return file
    }

    /// Removes a result, so that no script takes an old one for a new one.
    static func forget(_ name: String) {
        try? FileManager.default.removeItem(at: results.appendingPathComponent(name))
    }
}
