/// Names and shapes of edgellama's Core ML programs (edgellama/targets/coreml/interface.py), and how a prompt goes into them.
///
/// Shapes: T tokens of a call, E keys that the mask covers.
public enum CoreMLInterface {
    public static let inputIds: String = "inputIds"  // int32 [1, T]
    public static let mask: String = "causalMask"  // float16 [1, 1, T, E], 0 where a token may look and -inf elsewhere
    public static let position: String = "position"  // int32 [1], tokens in the cache before this call; static forms only
    public static let keyCache: String = "keyCache"
    public static let valueCache: String = "valueCache"
    public static let logits: String = "logits"  // float16 [1, T, vocab_size], or a classifier's rows
    public static let newKeys: String = "newKeys"  // float16 [L, 1, G, T, D], of coreml-pte
    public static let newValues: String = "newValues"

    public static let vocabSize: String = "edgellama.vocab_size"
    public static let outputSize: String = "edgellama.output_size"  // of a classifier only: number of logits
    public static let contextLength: String = "edgellama.context_length"

    /// Functions of a package with static shapes, and methods of a .pte. One function alone has no name.
    public static let decode: String = "decode"
    public static let prefill: String = "prefill"
    public static let forward: String = "forward"
    public static let prefillTokensMethod: String = "get_prefill_tokens"

    /// Tokens of one call where any number will do: the output has a row of logits for each.
    public static let longestCall: Int = 256

    /// Float16 as bits: Swift has the type on some processors only.
    static let zero: UInt16 = 0
    static let minusInfinity: UInt16 = 0xfc00

    /// The mask of a call, float16 bits, row by row: `rows` x `width`. Rows from `tokens` on are padding and see all
    /// that the last token sees; what they compute is not used.
    ///
    /// own: where the call's own keys lie: at `position`, or behind the cache where that is an input.
    public static func causalMask(rows: Int, width: Int, position: Int, own: Int) -> [UInt16] {
        var bits: [UInt16] = [UInt16](repeating: minusInfinity, count: rows * width)
        for row in 0..<rows {
            for column in 0..<min(position, width) { bits[row * width + column] = zero }
            for column in own..<min(own + row + 1, width) { bits[row * width + column] = zero }
        }
        return bits
    }

    /// A float16 as a float32, exactly.
    public static func float(_ half: UInt16) -> Float {
        let sign: UInt32 = UInt32(half & 0x8000) << 16
        let exponent: UInt32 = UInt32(half >> 10 & 0x1f)
        let fraction: UInt32 = UInt32(half & 0x3ff)
        switch exponent {
        case 0:
            let magnitude: Float = Float(fraction) * 0x1p-24
            return sign == 0 ? magnitude : -magnitude
        case 31:
            return Float(bitPattern: sign | 0x7f80_0000 | fraction << 13)
        default:
            return Float(bitPattern: sign | (exponent + 112) << 23 | fraction << 13)
        }
    }
}

/// One call of a program with static shapes, or of a flexible one: how many tokens it takes, and in which function.
public struct CoreMLCall: Equatable, Sendable {
    public let position: Int
    public let count: Int
    /// T: rows of the call, `count` or more.
    public let rows: Int
    public let isPrefill: Bool

    /// The calls that feed `count` tokens from `position` on. prefillTokens: T of the static prefill function; nil for
    /// one function of flexible shapes.
    public static func plan(count: Int, position: Int, contextLength: Int, prefillTokens: Int?) -> [CoreMLCall] {
        var calls: [CoreMLCall] = []
        var at: Int = position
        let end: Int = position + count
        while at < end {
            let left: Int = end - at
            var call: CoreMLCall = CoreMLCall(position: at, count: 1, rows: 1, isPrefill: false)
            if let rows: Int = prefillTokens {
                // A call writes as many rows as it has, used or not; at the end of the context they would not fit.
                if left > 1 && at + rows <= contextLength {
                    call = CoreMLCall(position: at, count: min(left, rows), rows: rows, isPrefill: true)
                }
            } else {
                let taken: Int = min(left, CoreMLInterface.longestCall)
                call = CoreMLCall(position: at, count: taken, rows: taken, isPrefill: false)
            }
            calls.append(call)
            at += call.count
        }
        return calls
    }
}
