/// UTF-8 that arrives in pieces: a character that is not complete waits for its other bytes. Each longest run of bytes
/// that begins a character and cannot be continued becomes one U+FFFD (Unicode 15, section 3.9), as in Python.
struct Utf8Decoder: Sendable {
    private static let replacement: Unicode.Scalar = "\u{fffd}"

    private var point: UInt32 = 0
    private var missing: Int = 0
    private var low: UInt8 = 0x80
    private var high: UInt8 = 0xbf

    mutating func push(_ bytes: [UInt8]) -> String {
        var out: String.UnicodeScalarView = String.UnicodeScalarView()
        for byte in bytes { push(byte, into: &out) }
        return String(out)
    }

    /// What was waiting: U+FFFD, or nothing.
    mutating func flush() -> String {
        let waiting: Bool = missing > 0
        missing = 0
        return waiting ? String(Character(Utf8Decoder.replacement)) : ""
    }

    private mutating func push(_ byte: UInt8, into out: inout String.UnicodeScalarView) {
        if missing > 0 {
            if byte >= low && byte <= high {
                point = (point << 6) | UInt32(byte & 0x3f)
                low = 0x80
                high = 0xbf
                missing -= 1
                if missing == 0 { out.append(Unicode.Scalar(point) ?? Utf8Decoder.replacement) }
                return
            }
            missing = 0
            out.append(Utf8Decoder.replacement)
        }
        low = 0x80
        high = 0xbf
        switch byte {
        case 0x00...0x7f:
            out.append(Unicode.Scalar(byte))
        case 0xc2...0xdf:
            start(UInt32(byte & 0x1f), following: 1)
        case 0xe0...0xef:
            if byte == 0xe0 { low = 0xa0 }  // else it could be written shorter
            if byte == 0xed { high = 0x9f }  // else it is a surrogate
            start(UInt32(byte & 0x0f), following: 2)
        case 0xf0...0xf4:
            if byte == 0xf0 { low = 0x90 }
            if byte == 0xf4 { high = 0x8f }
            start(UInt32(byte & 0x07), following: 3)
        default:
            out.append(Utf8Decoder.replacement)
        }
    }

    private mutating func start(_ bits: UInt32, following: Int) {
        point = bits
        missing = following
    }
}
