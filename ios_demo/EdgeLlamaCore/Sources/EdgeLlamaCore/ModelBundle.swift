import Foundation

/// One lowered file (or directory) of a bundle, and where it runs.
public struct Artifact: Sendable {
    public let target: String
    public let path: String
    public let bytes: Int
    public let schemes: [String]
    public let runtime: String
    public let minVersion: String
    public let peakBytes: Int
}

/// What the gate found when the bundle was exported. KL in nats per token.
public struct Accuracy: Sendable {
    public let verdict: String
    public let klMean: Double
    public let klLow: Double
    public let klHigh: Double
    public let top1: Double
}

/// An edgellama bundle on disk. Its manifest is read and checked when opened; files are verified when used.
public struct ModelBundle: Sendable {
    public static let schema: String = "edgellama.bundle/1"
    public static let manifestName: String = "manifest.json"

    private struct File: Sendable {
        let bytes: Int
        let sha256: String
    }

    public let directory: URL
    /// Version of the release, if an app with a `Trust` opened it and it has one.
    public let version: Int?
    public let name: String
    public let recipe: String
    /// The hardware that Core ML packages of this bundle are arranged for: `gpu` or `ane`.
    public let coremlProfile: String
    public let parameters: Int
    public let license: String?
    public let vocabSize: Int
    public let contextLength: Int
    public let stopIds: Set<Int>
    /// Labels and prompt of a bundle that classifies texts; nil for one that generates text.
    public let classifier: Classifier?
    /// Role prefixes and suffixes; nil with `noChatReason` when the model has no chat that an app can write.
    public let chatFormat: ChatFormat?
    public let noChatReason: String?
    public let artifacts: [Artifact]
    /// Number of logits of a position: of the labels' rows, or of the vocabulary.
    public var outputSize: Int { classifier?.rows ?? vocabSize }
    private let accuracies: [String: Accuracy]
    private let files: [String: File]

    /// The bundle at `directory`, its manifest read and checked. With `trust`, it must be signed.
    public init(_ directory: URL, trust: Trust? = nil) throws {
        let place: URL = directory.appendingPathComponent(ModelBundle.manifestName, isDirectory: false)
        guard let text: Data = try? Data(contentsOf: place) else {
            throw EdgeLlamaError.bundle(
                "\(directory.lastPathComponent) is not a bundle (no \(ModelBundle.manifestName))",
                remedy: "Choose a directory that `edgellama export` wrote."
            )
        }
        version = try trust.flatMap { try $0.verify([UInt8](text), ModelBundle.signature(directory)) }
        let manifest: JsonObject = try JsonObject.parse([UInt8](text), name: ModelBundle.manifestName)
        let schema: String? = try manifest.stringOrNil("schema")
        if schema != ModelBundle.schema {
            throw EdgeLlamaError.bundle(
                "\(ModelBundle.manifestName): schema is \(schema ?? "missing"), this app reads \(ModelBundle.schema)",
                remedy: "Use an app and an edgellama of the same version."
            )
        }
        let source: JsonObject = try manifest.object("source")
        let model: JsonObject = try manifest.object("model")
        let chat: JsonObject = try manifest.object("chat")
        let files: [String: File] = try ModelBundle.files(try manifest.object("files"))
        self.directory = directory
        self.files = files
        name = try manifest.string("name")
        recipe = try manifest.object("recipe").string("name")
        coremlProfile = try manifest.object("recipe").stringOrNil("coreml_profile") ?? "gpu"
        parameters = try source.int("parameters")
        license = try source.stringOrNil("license")
        vocabSize = try model.int("vocab_size")
        contextLength = try model.int("context_length")
        stopIds = Set(try model.ints("eos_token_ids"))
        classifier = try manifest.objectOrNil("classifier").map { try Classifier($0) }
        let rows: Int? = model.isNull("label_rows") ? nil : try model.int("label_rows")
        if rows != classifier?.rows {
            let (own, other): (String, String) = (ModelBundle.text(classifier?.rows), ModelBundle.text(rows))
            throw Classifier.wrong("it has \(own) rows, and its model has \(other)")
        }
        chatFormat = try chat.objectOrNil("format").map { try ChatFormat($0) }
        noChatReason = try chat.stringOrNil("reason")
        artifacts = try manifest.objects("artifacts").map { try ModelBundle.artifact($0, files) }
        accuracies = try ModelBundle.accuracies(try manifest.object("accuracy"))
        try trust?.check(name, version)
    }

    private static func text(_ count: Int?) -> String { count.map { String($0) } ?? "no" }

    /// The beginning of the signature's file, enough to see that it is too long; nil without one.
    private static func signature(_ directory: URL) -> [UInt8]? {
        let place: URL = directory.appendingPathComponent(ManifestSignature.file, isDirectory: false)
        guard let file: FileHandle = try? FileHandle(forReadingFrom: place) else { return nil }
        defer { try? file.close() }
        guard let data: Data = try? file.read(upToCount: ManifestSignature.longest + 1) else { return nil }
        return [UInt8](data)
    }

    private static func files(_ json: JsonObject) throws -> [String: File] {
        var files: [String: File] = [:]
        for member in json.members {
            try checkPath(member.name)
            let entry: JsonObject = try json.asObject(member.value, member.name)
            files[member.name] = File(bytes: try entry.int("bytes"), sha256: try entry.string("sha256"))
        }
        return files
    }

    private static func artifact(_ json: JsonObject, _ files: [String: File]) throws -> Artifact {
        let path: String = try json.string("path")
        try checkPath(path)
        if under(path, files).isEmpty { throw EdgeLlamaError.bundle("the artifact \(path) is not among the files") }
        var schemes: [String] = []
        for group in try json.objects("quantization") {
            let scheme: String = try group.string("scheme")
            if !schemes.contains(scheme) { schemes.append(scheme) }
        }
        let requires: JsonObject = try json.object("requires")
        return Artifact(
            target: try json.string("target"),
            path: path,
            bytes: try json.int("bytes"),
            schemes: schemes,
            runtime: try requires.string("runtime"),
            minVersion: try requires.string("min_version"),
            peakBytes: try json.object("memory").int("peak_estimate")
        )
    }

    private static func accuracies(_ json: JsonObject) throws -> [String: Accuracy] {
        var found: [String: Accuracy] = [:]
        for member in json.members where member.value != .null {
            let entry: JsonObject = try json.asObject(member.value, member.name)
            let interval: [Double] = try entry.doubles("kl_mean_ci95")
            if interval.count != 2 { throw EdgeLlamaError.bundle("accuracy.\(member.name).kl_mean_ci95 is no interval") }
            found[member.name] = Accuracy(
                verdict: try entry.string("verdict"),
                klMean: try entry.double("kl_mean"),
                klLow: interval[0],
                klHigh: interval[1],
                top1: try entry.double("top1_agreement")
            )
        }
        return found
    }

    /// Refuses a path that leaves the bundle, or that means different files on different systems.
    static func checkPath(_ path: String) throws {
        let strange: Bool = path.unicodeScalars.contains { $0.value < 0x20 || $0.value == 0x7f || $0 == "\\" }
        let parts: [Substring] = path.split(separator: "/", omittingEmptySubsequences: false)
        if strange || parts.contains(where: { $0.isEmpty || $0 == "." || $0 == ".." }) {
            throw EdgeLlamaError.bundle("\(manifestName) names the path \"\(path)\", which may leave the bundle")
        }
    }

    /// The artifact for `target`.
    public func artifact(_ target: String) throws -> Artifact {
        if let found: Artifact = artifacts.first(where: { $0.target == target }) { return found }
        let targets: String = artifacts.map { $0.target }.joined(separator: ", ")
        throw EdgeLlamaError.bundle(
            "this bundle has no artifact for \(target) (it has \(targets))",
            remedy: "Export it with `edgellama export -t \(target)`."
        )
    }

    /// What export measured for `target`; nil when it was not validated.
    public func accuracy(_ target: String) -> Accuracy? { accuracies[target] }

    /// Whether the manifest names the file `path`.
    public func has(_ path: String) -> Bool { files[path] != nil }

    /// The hash of the file `path` in the manifest.
    public func sha256(_ path: String) throws -> String { try entry(path).sha256 }

    /// The artifact's hash; of a directory, of the lines `HASH  PATH` of its files in the order of their paths.
    public func artifactSha256(_ target: String) throws -> String {
        let path: String = try artifact(target).path
        if let file: File = files[path] { return file.sha256 }
        var lines: String = ""
        for name in ModelBundle.under(path, files) {
            lines += try entry(name).sha256 + "  " + String(name.dropFirst(path.count + 1)) + "\n"
        }
        return Sha256.hex(Array(lines.utf8))
    }

    /// Where the artifact for `target` lies, each of its files proven to be what the manifest says. `onBytes` hears
    /// how many bytes were read.
    public func artifactFile(_ target: String, onBytes: (Int) -> Void = { _ in }) throws -> URL {
        let path: String = try artifact(target).path
        for name in ModelBundle.under(path, files) { _ = try file(name, onBytes: onBytes) }
        return directory.appendingPathComponent(path)
    }

    /// The file `path`, proven to be what the manifest says. `onBytes` hears how many bytes were read.
    public func file(_ path: String, onBytes: (Int) -> Void = { _ in }) throws -> URL {
        let expected: File = try entry(path)
        var place: URL = directory
        let parts: [Substring] = path.split(separator: "/")
        for (index, part) in parts.enumerated() {
            let last: Bool = index == parts.count - 1
            place.appendPathComponent(String(part), isDirectory: !last)
            let attributes: [FileAttributeKey: Any]? = try? FileManager.default.attributesOfItem(atPath: place.path)
            let type: FileAttributeType? = attributes?[.type] as? FileAttributeType
            if type == .typeSymbolicLink { throw problem("\(path) is a link") }
            if type != (last ? FileAttributeType.typeRegular : FileAttributeType.typeDirectory) {
                throw problem("\(path) is missing")
            }
            guard last else { continue }
            let size: Int = (attributes?[.size] as? NSNumber)?.intValue ?? -1
            if size != expected.bytes {
                throw problem("\(path) has \(size) bytes, the manifest says \(expected.bytes)")
            }
        }
        if try hash(place, path, onBytes) != expected.sha256 {
            throw problem("\(path) is not the file that was exported (its hash differs)")
        }
        return place
    }

    /// The bytes of the file `path`, verified.
    func bytes(_ path: String) throws -> [UInt8] {
        let place: URL = try file(path)
        guard let data: Data = try? Data(contentsOf: place) else { throw problem("\(path) cannot be read") }
        return [UInt8](data)
    }

    /// The tokenizer, verified.
    public func tokenizer() throws -> Tokenizer { try Tokenizer(try bytes("tokenizer/tokenizer.json")) }

    private func entry(_ path: String) throws -> File {
        guard let file: File = files[path] else { throw problem("no file \(path) in this bundle") }
        return file
    }

    private func problem(_ what: String) -> EdgeLlamaError { EdgeLlamaError.bundle("\(name): \(what)") }

    /// The file `path`, or all files in the directory `path`, in the order of their bytes.
    private static func under(_ path: String, _ files: [String: File]) -> [String] {
        files.keys.filter { $0 == path || $0.hasPrefix(path + "/") }
            .sorted { $0.utf8.lexicographicallyPrecedes($1.utf8) }
    }

    private func hash(_ place: URL, _ path: String, _ onBytes: (Int) -> Void) throws -> String {
        guard let stream: InputStream = InputStream(url: place) else { throw problem("\(path) cannot be read") }
        stream.open()
        defer { stream.close() }
        var hash: Sha256 = Sha256()
        var buffer: [UInt8] = [UInt8](repeating: 0, count: 1 << 16)
        while true {
            let count: Int = stream.read(&buffer, maxLength: buffer.count)
            if count < 0 { throw problem("\(path) cannot be read") }
            if count == 0 { return hash.hexDigest() }
            hash.update(buffer[..<count])
            onBytes(count)
        }
    }
}
