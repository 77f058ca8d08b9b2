extension Json {
    /// The value in `text`. Throws for anything that is not one JSON value.
    static func parse(_ text: [UInt8]) throws -> Json {
        var parser: JsonParser = JsonParser(text: text)
        return try parser.document()
    }
}

private struct JsonParser {
    private static let maxDepth: Int = 64

    private let text: [UInt8]
    private var at: Int = 0

    init(text: [UInt8]) {
        self.text = text
    }

    mutating func document() throws -> Json {
        let found: Json = try value(depth: 0)
        space()
        if at < text.count { throw fail("text after the value") }
        return found
    }

    private mutating func value(depth: Int) throws -> Json {
        if depth > JsonParser.maxDepth { throw fail("nested more than \(JsonParser.maxDepth) deep") }
        space()
        switch try peek() {
        case UInt8(ascii: "{"): return try objectValue(depth: depth)
        case UInt8(ascii: "["): return try arrayValue(depth: depth)
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .bool(true))
        case UInt8(ascii: "f"): return try word("false", .bool(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        default: return try number()
        }
    }

    private mutating func objectValue(depth: Int) throws -> Json {
        var members: [JsonMember] = []
        at += 1
        space()
        if try peek() == UInt8(ascii: "}") {
            at += 1
            return .object(members)
        }
        while true {
            space()
            if try peek() != UInt8(ascii: "\"") { throw fail("expected a name") }
            let name: String = try string()
            space()
            try expect(UInt8(ascii: ":"))
            members.append(JsonMember(name: name, value: try value(depth: depth + 1)))
            space()
            if try peek() == UInt8(ascii: "}") { break }
            try expect(UInt8(ascii: ","))
        }
        at += 1
        return .object(members)
    }

    private mutating func arrayValue(depth: Int) throws -> Json {
        var items: [Json] = []
        at += 1
        space()
        if try peek() == UInt8(ascii: "]") {
            at += 1
            return .array(items)
        }
        while true {
            items.append(try value(depth: depth + 1))
            space()
            if try peek() == UInt8(ascii: "]") { break }
            try expect(UInt8(ascii: ","))
        }
        at += 1
        return .array(items)
    }

    private mutating func string() throws -> String {
        try expect(UInt8(ascii: "\""))
        var bytes: [UInt8] = []
        while true {
            let byte: UInt8 = try peek()
            if byte == UInt8(ascii: "\"") {
                at += 1
                guard let found: String = String(validatingUTF8Bytes: bytes) else { throw fail("text that is not UTF-8") }
                return found
            }
            if byte < 0x20 { throw fail("a control character in a string") }
            if byte == UInt8(ascii: "\\") {
                bytes.append(contentsOf: Array(String(Character(try escape())).utf8))
            } else {
                bytes.append(byte)
                at += 1
            }
        }
    }

    private mutating func escape() throws -> Unicode.Scalar {
        at += 1
        let byte: UInt8 = try peek()
        at += 1
        switch byte {
        case UInt8(ascii: "\""), UInt8(ascii: "\\"), UInt8(ascii: "/"): return Unicode.Scalar(byte)
        case UInt8(ascii: "b"): return "\u{8}"
        case UInt8(ascii: "f"): return "\u{c}"
        case UInt8(ascii: "n"): return "\n"
        case UInt8(ascii: "r"): return "\r"
        case UInt8(ascii: "t"): return "\t"
        case UInt8(ascii: "u"): return try codePoint()
        default: throw fail("unknown escape")
        }
    }

    private mutating func codePoint() throws -> Unicode.Scalar {
        let first: UInt32 = try fourDigits()
        if let scalar: Unicode.Scalar = Unicode.Scalar(first) { return scalar }
        // Half of a surrogate pair; a Swift string cannot hold one without the other.
        if first < 0xDC00, at + 1 < text.count, text[at] == UInt8(ascii: "\\"), text[at + 1] == UInt8(ascii: "u") {
            at += 2
            let second: UInt32 = try fourDigits()
            if second >= 0xDC00, second < 0xE000 {
                let point: UInt32 = 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00)
                if let scalar: Unicode.Scalar = Unicode.Scalar(point) { return scalar }
            }
        }
        throw fail("half of a character")
    }

    private mutating func fourDigits() throws -> UInt32 {
        var found: UInt32 = 0
        for _ in 0..<4 {
            guard at < text.count, let digit: Int = Character(Unicode.Scalar(text[at])).hexDigitValue else {
                throw fail("expected four hexadecimal digits")
            }
            found = found * 16 + UInt32(digit)
            at += 1
        }
        return found
    }

    private mutating func number() throws -> Json {
        let start: Int = at
        if try peek() == UInt8(ascii: "-") { at += 1 }
        if try peek() == UInt8(ascii: "0") { at += 1 } else { try digits() }
        var whole: Bool = true
        if at < text.count, text[at] == UInt8(ascii: ".") {
            whole = false
            at += 1
            try digits()
        }
        if at < text.count, text[at] == UInt8(ascii: "e") || text[at] == UInt8(ascii: "E") {
            whole = false
            at += 1
            let sign: UInt8 = try peek()
            if sign == UInt8(ascii: "+") || sign == UInt8(ascii: "-") { at += 1 }
            try digits()
        }
        let found: String = String(decoding: text[start..<at], as: UTF8.self)
        if whole, let value: Int = Int(found) { return .int(value) }
        guard let value: Double = Double(found) else { throw fail("expected a number") }
        return .double(value)
    }

    private mutating func digits() throws {
        if !JsonParser.isDigit(try peek()) { throw fail("expected a value") }
        while at < text.count, JsonParser.isDigit(text[at]) { at += 1 }
    }

    private static func isDigit(_ byte: UInt8) -> Bool {
        byte >= UInt8(ascii: "0") && byte <= UInt8(ascii: "9")
    }

    private mutating func word(_ word: String, _ value: Json) throws -> Json {
        let bytes: [UInt8] = Array(word.utf8)
        if !text[at...].starts(with: bytes) { throw fail("expected a value") }
        at += bytes.count
        return value
    }

    private mutating func space() {
        while at < text.count {
            switch text[at] {
            case 0x20, 0x0A, 0x0D, 0x09: at += 1
            default: return
            }
        }
    }

    private func peek() throws -> UInt8 {
        if at < text.count { return text[at] }
        throw fail("it ends too early")
    }

    private mutating func expect(_ byte: UInt8) throws {
        if try peek() != byte { throw fail("expected '\(Character(Unicode.Scalar(byte)))'") }
        at += 1
    }

    private func fail(_ problem: String) -> JsonError {
        JsonError(message: "not JSON: \(problem) at byte \(at)")
    }
}

extension String {
    /// The text in UTF-8 `bytes`; nil where they are not UTF-8.
    init?(validatingUTF8Bytes bytes: [UInt8]) {
        let text: String = String(decoding: bytes, as: UTF8.self)
        // Decoding repairs what is not UTF-8, and then the bytes are others.
        guard text.utf8.elementsEqual(bytes) else { return nil }
        self = text
    }
}
