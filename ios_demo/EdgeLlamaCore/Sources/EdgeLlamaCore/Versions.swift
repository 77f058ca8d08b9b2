import Foundation

/// The highest version of each bundle that this device has loaded, by the bundle's name.
public protocol Versions: Sendable {
    func highest(_ name: String) throws -> Int?
    func loaded(_ name: String, _ version: Int) throws
}

/// Versions in a file of the app's own directory.
public struct FileVersions: Versions {
    private let file: URL

    public init(_ file: URL) {
        self.file = file
    }

    public func highest(_ name: String) throws -> Int? {
        guard let json: JsonObject = try read(), !json.isNull(name) else { return nil }
        return try json.int(name)
    }

    public func loaded(_ name: String, _ version: Int) throws {
        let known: JsonObject? = try read()
        if let known: JsonObject = known, !known.isNull(name), try known.int(name) >= version { return }
        var members: [JsonMember] = (known?.members ?? []).filter { Array($0.name.utf8) != Array(name.utf8) }
        members.append(JsonMember(name: name, value: .int(version)))
        do {
            try FileManager.default.createDirectory(
                at: file.deletingLastPathComponent(), withIntermediateDirectories: true
            )
            try Data(Json.object(members).written().utf8).write(to: file, options: .atomic)
        } catch {
            throw unusable(error)
        }
    }

    /// Nil if nothing was loaded yet.
    private func read() throws -> JsonObject? {
        if !FileManager.default.fileExists(atPath: file.path) { return nil }
        let data: Data
        do {
            data = try Data(contentsOf: file)
        } catch {
            throw unusable(error)
        }
        return try JsonObject.parse([UInt8](data), name: file.lastPathComponent)
    }

    private func unusable(_ error: any Error) -> EdgeLlamaError {
        EdgeLlamaError.bundle(
            "\(file.lastPathComponent), the list of versions that were loaded, cannot be used "
                + "(\(error.localizedDescription))",
            remedy: "Free some space."
        )
    }
}
