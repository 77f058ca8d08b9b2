/// SHA-256 (FIPS 180-4). CryptoKit has it on Apple's systems only, and this code is tested elsewhere too.
struct Sha256 {
    private static let constants: [UInt32] = [
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
    ]

    private var state: [UInt32] = [
        0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
    ]
    private var words: [UInt32] = [UInt32](repeating: 0, count: 64)
    private var waiting: [UInt8] = []
    private var length: UInt64 = 0

    /// The digest of `bytes`, 64 hexadecimal digits in lower case.
    static func hex(_ bytes: [UInt8]) -> String {
        var hash: Sha256 = Sha256()
        hash.update(bytes[...])
        return hash.hexDigest()
    }

    mutating func update(_ bytes: ArraySlice<UInt8>) {
        length &+= UInt64(bytes.count)
        var rest: ArraySlice<UInt8> = bytes
        if !waiting.isEmpty {
            let taken: Int = min(64 - waiting.count, rest.count)
            waiting.append(contentsOf: rest.prefix(taken))
            rest = rest.dropFirst(taken)
            if waiting.count < 64 { return }
            let block: [UInt8] = waiting
            block.withUnsafeBufferPointer { compress($0, at: 0) }
            waiting.removeAll(keepingCapacity: true)
        }
        let whole: Int = rest.count / 64 * 64
        rest.withUnsafeBufferPointer { buffer in
            var at: Int = 0
            while at < whole {
                compress(buffer, at: at)
                at += 64
            }
        }
        waiting.append(contentsOf: rest.dropFirst(whole))
    }

    /// Ends the input.
    mutating func hexDigest() -> String {
        let bits: UInt64 = length &* 8
        let padding: Int = (119 - waiting.count) % 64
        var end: [UInt8] = [0x80] + [UInt8](repeating: 0, count: padding)
        for shift in stride(from: 56, through: 0, by: -8) {
            end.append(UInt8(truncatingIfNeeded: bits >> UInt64(shift)))
        }
        update(end[...])
        return state.map { word in
            let digits: String = String(word, radix: 16)
            return String(repeating: "0", count: 8 - digits.count) + digits
        }.joined()
    }

    private mutating func compress(_ block: UnsafeBufferPointer<UInt8>, at start: Int) {
        for i in 0..<16 {
            let at: Int = start + 4 * i
            words[i] = UInt32(block[at]) << 24 | UInt32(block[at + 1]) << 16 | UInt32(block[at + 2]) << 8
                | UInt32(block[at + 3])
        }
        for i in 16..<64 {
            let a: UInt32 = words[i - 15]
            let b: UInt32 = words[i - 2]
            let low: UInt32 = Sha256.rotate(a, 7) ^ Sha256.rotate(a, 18) ^ (a >> 3)
            let high: UInt32 = Sha256.rotate(b, 17) ^ Sha256.rotate(b, 19) ^ (b >> 10)
            words[i] = words[i - 16] &+ low &+ words[i - 7] &+ high
        }
        var a: UInt32 = state[0]
        var b: UInt32 = state[1]
        var c: UInt32 = state[2]
        var d: UInt32 = state[3]
        var e: UInt32 = state[4]
        var f: UInt32 = state[5]
        var g: UInt32 = state[6]
        var h: UInt32 = state[7]
        for i in 0..<64 {
            let high: UInt32 = Sha256.rotate(e, 6) ^ Sha256.rotate(e, 11) ^ Sha256.rotate(e, 25)
            let choice: UInt32 = (e & f) ^ (~e & g)
            let first: UInt32 = h &+ high &+ choice &+ Sha256.constants[i] &+ words[i]
            let low: UInt32 = Sha256.rotate(a, 2) ^ Sha256.rotate(a, 13) ^ Sha256.rotate(a, 22)
            let majority: UInt32 = (a & b) ^ (a & c) ^ (b & c)
            h = g
            g = f
            f = e
            e = d &+ first
            d = c
            c = b
            b = a
            a = first &+ low &+ majority
        }
        state[0] = state[0] &+ a
        state[1] = state[1] &+ b
        state[2] = state[2] &+ c
        state[3] = state[3] &+ d
        state[4] = state[4] &+ e
        state[5] = state[5] &+ f
        state[6] = state[6] &+ g
        state[7] = state[7] &+ h
    }

    private static func rotate(_ word: UInt32, _ count: UInt32) -> UInt32 {
        word >> count | word << (32 - count)
    }
}
