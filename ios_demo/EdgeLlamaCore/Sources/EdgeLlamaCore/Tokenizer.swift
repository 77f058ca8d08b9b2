/// A piece of a text. Control tokens in a typed one are text, because a person or a model wrote it.
struct TextPart: Sendable {
    let text: String
    let isTyped: Bool
}

/// Byte-level BPE, as a bundle's tokenizer.json describes it: the same ids and the same text as in Python.
public struct Tokenizer: Sendable {
    let preTokenizer: PreTokenizer
    private let file: TokenizerFile
    /// Added tokens of each pass, the longest first, so that the first that fits is the longest.
    private let passes: [[TokenizerFile.Added]]
    private let special: Set<Int>
    /// The id of each byte; nil where the vocabulary has none.
    private let byteIds: [Int?]

    /// The tokenizer in the text of a tokenizer.json. Throws when it is of another kind.
    init(_ text: [UInt8]) throws {
        let file: TokenizerFile = try TokenizerFile(text)
        self.file = file
        preTokenizer = file.preTokenizer
        passes = [false, true].map { (pass: Bool) -> [TokenizerFile.Added] in
            file.added.filter { $0.normalized == pass }.sorted { $0.content.count > $1.content.count }
        }
        special = Set(file.added.filter { $0.special }.map { $0.id })
        byteIds = ByteLevel.character.map { file.vocab[Array(String(Character($0)).utf8)] }
    }

    /// Token ids of `text`; special tokens written in it become their ids. A chat wants no `addSpecialTokens`.
    public func encode(_ text: String, addSpecialTokens: Bool = true) -> [Int] {
        var ids: [Int] = addSpecialTokens ? file.before : []
        encode(Array(text.utf8)[...], typed: [], pass: 0, into: &ids)
        return addSpecialTokens ? ids + file.after : ids
    }

    /// Token ids of the joined parts. Control tokens become their ids outside of typed parts only. A chat wants no
    /// `addSpecialTokens`.
    func encode(_ parts: [TextPart], addSpecialTokens: Bool = false) -> [Int] {
        var text: [UInt8] = []
        var typed: [Range<Int>] = []
        for part in parts {
            let start: Int = text.count
            text += Array(part.text.utf8)
            if part.isTyped { typed.append(start..<text.count) }
        }
        var ids: [Int] = addSpecialTokens ? file.before : []
        encode(text[...], typed: typed, pass: 0, into: &ids)
        return addSpecialTokens ? ids + file.after : ids
    }

    /// The text of `ids`, special tokens left out.
    public func decode(_ ids: [Int]) -> String {
        var stream: TokenStream = stream()
        var text: String = ""
        for id in ids { text += stream.push(id) }
        return text + stream.flush()
    }

    /// A decoder for ids that arrive one by one.
    public func stream() -> TokenStream { TokenStream(tokenizer: self) }

    fileprivate func bytes(of id: Int) -> [UInt8] {
        if special.contains(id) || !file.pieces.indices.contains(id) { return [] }
        return file.pieces[id] ?? []
    }

    /// Finds the added tokens of each pass in turn, and encodes what is between them.
    private func encode(_ text: ArraySlice<UInt8>, typed: [Range<Int>], pass: Int, into ids: inout [Int]) {
        if text.isEmpty { return }
        if pass == passes.count {
            words(text, into: &ids)
            return
        }
        var start: Int = text.startIndex
        var at: Int = text.startIndex
        while at < text.endIndex {
            let rest: ArraySlice<UInt8> = text[at...]
            let found: TokenizerFile.Added? = passes[pass].first { (token: TokenizerFile.Added) -> Bool in
                guard rest.starts(with: token.content) else { return false }
                let place: Range<Int> = at..<at + token.content.count
                return !token.special || !typed.contains { $0.overlaps(place) }
            }
            guard let token: TokenizerFile.Added = found else {
                at += 1
                continue
            }
            encode(text[start..<at], typed: typed, pass: pass + 1, into: &ids)
            ids.append(token.id)
            at += token.content.count
            start = at
        }
        encode(text[start...], typed: typed, pass: pass + 1, into: &ids)
    }

    private func words(_ text: ArraySlice<UInt8>, into ids: inout [Int]) {
        var points: [UInt32] = []
        var byteEnds: [Int] = []  // where each point ends in `text`
        var end: Int = text.startIndex
        for scalar in String(decoding: text, as: UTF8.self).unicodeScalars {
            points.append(scalar.value)
            end += UTF8.width(scalar)
            byteEnds.append(end)
        }
        var start: Int = text.startIndex
        for wordEnd in preTokenizer.ends(points) {
            let bytes: ArraySlice<UInt8> = text[start..<byteEnds[wordEnd - 1]]
            start = byteEnds[wordEnd - 1]
            if file.ignoreMerges, let whole: Int = file.vocab[Tokenizer.piece(bytes)] {
                ids.append(whole)
            } else {
                ids += file.merges.apply(bytes.compactMap { byteIds[Int($0)] })
            }
        }
    }

    /// The UTF-8 of the piece that stands for `bytes` in the vocabulary.
    private static func piece(_ bytes: ArraySlice<UInt8>) -> [UInt8] {
        var piece: String.UnicodeScalarView = String.UnicodeScalarView()
        for byte in bytes { piece.append(ByteLevel.character[Int(byte)]) }
        return Array(String(piece).utf8)
    }
}

/// Text of ids that arrive one by one; the pieces joined are the text of all of them.
public struct TokenStream: Sendable {
    private let tokenizer: Tokenizer
    private var utf8: Utf8Decoder = Utf8Decoder()

    fileprivate init(tokenizer: Tokenizer) {
        self.tokenizer = tokenizer
    }

    /// The text that became certain with this token: half a character waits for its other half.
    public mutating func push(_ id: Int) -> String { utf8.push(tokenizer.bytes(of: id)) }

    /// What was still waiting.
    public mutating func flush() -> String { utf8.flush() }
}

extension UTF8 {
    /// Bytes of a scalar in UTF-8.
    static func width(_ scalar: Unicode.Scalar) -> Int {
        switch scalar.value {
        case 0..<0x80: return 1
        case 0x80..<0x800: return 2
        case 0x800..<0x10000: return 3
        default: return 4
        }
    }
}
