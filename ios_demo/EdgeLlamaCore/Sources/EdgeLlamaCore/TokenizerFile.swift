/// What a bundle's tokenizer.json says, checked to be of the kind that `Tokenizer` computes.
struct TokenizerFile: Sendable {
    /// A token that is found in a text before anything is split.
    struct Added: Sendable {
        let id: Int
        let content: [UInt8]
        let special: Bool
        let normalized: Bool
    }

    /// Ids by the UTF-8 of their pieces. Not strings: Swift takes those for equal that are written in other bytes.
    let vocab: [[UInt8]: Int]
    /// Bytes that each id stands for; nil where there is no token.
    let pieces: [[UInt8]?]
    let merges: Merges
    let ignoreMerges: Bool
    let preTokenizer: PreTokenizer
    let added: [Added]
    /// Ids that are put before and after a text.
    let before: [Int]
    let after: [Int]

    private static let maxId: Int = 1 << 22

    init(_ text: [UInt8]) throws {
        let json: JsonObject = try JsonObject.parse(text, name: "tokenizer.json")
        let model: JsonObject = try json.object("model")
        let decoder: String? = try json.objectOrNil("decoder")?.string("type")
        if try model.string("type") != "BPE" || decoder != "ByteLevel" {
            throw TokenizerFile.unsupported("its model is not a byte-level BPE")
        }
        if try json.objectOrNil("normalizer") != nil {
            throw TokenizerFile.unsupported("it changes text before splitting it")
        }
        var vocab: [[UInt8]: Int] = [:]
        var pieces: [[UInt8]?] = []
        func put(_ bytes: [UInt8], _ id: Int) throws {
            if id < 0 || id > TokenizerFile.maxId { throw TokenizerFile.unsupported("it has token ids out of bounds") }
            while pieces.count <= id { pieces.append(nil) }
            pieces[id] = bytes
        }
        for member in try model.object("vocab").members {
            guard case .int(let id) = member.value else {
                throw EdgeLlamaError.bundle("tokenizer.json: the id of a token is not a whole number")
            }
            vocab[Array(member.name.utf8)] = id
            try put(ByteLevel.bytes(of: member.name), id)
        }
        let added: [Added] = try json.objects("added_tokens").map(TokenizerFile.addedToken)
        for token in added {
            try put(ByteLevel.bytes(of: String(decoding: token.content, as: UTF8.self)), token.id)
        }
        self.vocab = vocab
        self.pieces = pieces
        self.added = added
        merges = try TokenizerFile.merges(try model.array("merges"), vocab)
        ignoreMerges = try model.bool("ignore_merges", or: false)
        preTokenizer = try PreTokenizer.of(try json.objectOrNil("pre_tokenizer"))
        (before, after) = try TokenizerFile.around(try json.objectOrNil("post_processor"))
    }

    private static func addedToken(_ json: JsonObject) throws -> Added {
        let content: String = try json.string("content")
        let id: Int = try json.int("id")
        let strips: Bool = try json.bool("lstrip") || json.bool("rstrip") || json.bool("single_word")
        if strips || content.isEmpty || id < 0 {
            throw EdgeLlamaError.tokenizer("this app cannot find the token '\(content)' as tokenizer.json says")
        }
        return Added(
            id: id,
            content: Array(content.utf8),
            special: try json.bool("special"),
            normalized: try json.bool("normalized")
        )
    }

    /// "left right" or ["left", "right"].
    private static func merges(_ list: [Json], _ vocab: [[UInt8]: Int]) throws -> Merges {
        var merges: Merges = Merges(capacity: list.count)
        for (rank, item) in list.enumerated() {
            var pair: [[UInt8]] = []
            switch item {
            case .string(let text):
                pair = Array(text.utf8).split(separator: 0x20, maxSplits: 1).map { Array($0) }
            case .array(let items):
                for case .string(let text) in items { pair.append(Array(text.utf8)) }
            default:
                break
            }
            guard pair.count == 2, let left: Int = vocab[pair[0]], let right: Int = vocab[pair[1]],
                let joined: Int = vocab[pair[0] + pair[1]]
            else {
                throw EdgeLlamaError.tokenizer("tokenizer.json: merge \(rank) is not of tokens in the vocabulary")
            }
            merges.add(left: left, right: right, rank: rank, joined: joined)
        }
        return merges
    }

    /// Ids that the post-processor puts before and after a text.
    private static func around(_ json: JsonObject?) throws -> ([Int], [Int]) {
        guard let json: JsonObject = json else { return ([], []) }
        var steps: [JsonObject] = try json.string("type") == "Sequence" ? json.objects("processors") : [json]
        steps = try steps.filter { try $0.string("type") != "ByteLevel" }
        if steps.isEmpty { return ([], []) }
        guard steps.count == 1, try steps[0].string("type") == "TemplateProcessing" else {
            throw unsupported("it adds special tokens in an unknown way")
        }
        let known: JsonObject = try steps[0].object("special_tokens")
        var before: [Int] = []
        var after: [Int] = []
        var seen: Bool = false
        for step in try steps[0].objects("single") {
            if let token: JsonObject = try step.objectOrNil("SpecialToken") {
                let ids: [Int] = try known.object(try token.string("id")).ints("ids")
                if seen { after += ids } else { before += ids }
            } else {
                seen = true
            }
        }
        return (before, after)
    }

    private static func unsupported(_ reason: String) -> EdgeLlamaError {
        EdgeLlamaError.tokenizer(
            "this app cannot use this tokenizer: \(reason)",
            remedy: "Use a model with a byte-level tokenizer, such as SmolLM2 or Llama 3."
        )
    }
}
