/// GPT-2's table: the printable character that stands for each byte in a byte-level vocabulary.
enum ByteLevel {
    static let character: [Unicode.Scalar] = {
        var table: [Unicode.Scalar] = []
        var others: UInt32 = 0
        for byte in UInt8.min...UInt8.max {
            let printable: Bool = (0x21...0x7e).contains(byte) || (0xa1...0xac).contains(byte) || byte >= 0xae
            if printable {
                table.append(Unicode.Scalar(byte))
            } else {
                table.append(Unicode.Scalar(0x100 + others)!)
                others += 1
            }
        }
        return table
    }()

    private static let byte: [UInt32: UInt8] = {
        var table: [UInt32: UInt8] = [:]
        for (byte, scalar) in character.enumerated() { table[scalar.value] = UInt8(byte) }
        return table
    }()

    /// The bytes of a piece of the vocabulary; of a piece with any other character, its own text in UTF-8.
    static func bytes(of piece: String) -> [UInt8] {
        var bytes: [UInt8] = []
        for scalar in piece.unicodeScalars {
            guard let byte: UInt8 = byte[scalar.value] else { return Array(piece.utf8) }
            bytes.append(byte)
        }
        return bytes
    }
}
