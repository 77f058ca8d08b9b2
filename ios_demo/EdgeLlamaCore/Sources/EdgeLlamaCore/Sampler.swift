import Foundation

/// SplitMix64 (Steele, Lea, Flood 2014): the same sequence in every language.
struct SplitMix: Sendable {
    private var state: UInt64

    init(seed: UInt64) {
        state = seed
    }

    /// 64 random bits.
    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z: UInt64 = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    /// A number in [0, 1): the upper 53 bits of `next`.
    mutating func uniform() -> Double {
        Double(next() >> 11) * 0x1p-53
    }
}

/// Draws the next token; the same seed gives the same tokens as in Python.
public struct Sampler: Sendable {
    private let temperature: Double
    private let topP: Double
    private var random: SplitMix

    public static let greedy: Sampler = Sampler()

    private init() {
        temperature = 0
        topP = 1
        random = SplitMix(seed: 0)
    }

    /// temperature: 0 is greedy (the lowest id among equals). topP: the smallest set of tokens whose probability
    /// reaches it is kept. Throws for settings without a meaning.
    public init(temperature: Double, topP: Double = 1, seed: UInt64 = 0) throws {
        guard temperature >= 0 && temperature <= 100 else {
            throw EdgeLlamaError(.settings, "temperature must lie in [0, 100], got \(temperature)", remedy: "0 is greedy.")
        }
        guard topP > 0 && topP <= 1 else {
            throw EdgeLlamaError(.settings, "top_p must lie in (0, 1], got \(topP)", remedy: "1 keeps every token.")
        }
        self.temperature = temperature
        self.topP = topP
        random = SplitMix(seed: seed)
    }

    /// The next token's id. Throws when a logit is no number.
    public mutating func sample(_ logits: [Float]) throws -> Int {
        let best: Int = try Sampler.best(logits)
        if temperature == 0 { return best }
        let order: [Int] = Sampler.descending(logits)
        let top: Double = Double(logits[best])
        var cumulative: [Double] = []
        cumulative.reserveCapacity(order.count)
        var sum: Double = 0
        for id in order {
            sum += exp((Double(logits[id]) - top) / temperature)
            cumulative.append(sum)
        }
        let limit: Double = topP * sum
        let last: Int = Sampler.firstIndex(cumulative) { $0 >= limit }
        let drawn: Double = random.uniform() * cumulative[last]
        return order[min(Sampler.firstIndex(cumulative) { $0 > drawn }, last)]
    }

    /// The most probable token, the lowest id among equals. Throws for what is no number.
    public static func best(_ logits: [Float]) throws -> Int {
        var best: Int = 0
        for id in logits.indices {
            if logits[id].isNaN {
                throw EdgeLlamaError(
                    .model,
                    "the model computed no number for token \(id)",
                    remedy: "Run the accuracy check; it says whether this device computes the model correctly."
                )
            }
            if logits[id] > logits[best] { best = id }
        }
        return best
    }

    /// Ids by descending logit, the lower id first among equals.
    private static func descending(_ logits: [Float]) -> [Int] {
        // One number a token: the logit's bits in the order of their values, turned around, and the id below them.
        var keys: [UInt64] = []
        keys.reserveCapacity(logits.count)
        for id in logits.indices {
            let bits: UInt32 = (logits[id] + 0).bitPattern  // + 0 makes one zero of the two
            let ordered: UInt32 = bits & 0x8000_0000 != 0 ? ~bits : bits | 0x8000_0000
            keys.append(UInt64(~ordered) << 32 | UInt64(id))
        }
        keys.sort()
        return keys.map { Int($0 & 0xffff_ffff) }
    }

    /// The first index for which `found`, which is false up to some index and then true; the last if none.
    private static func firstIndex(_ sorted: [Double], _ found: (Double) -> Bool) -> Int {
        var low: Int = 0
        var high: Int = sorted.count - 1
        while low < high {
            let middle: Int = (low + high) / 2
            if found(sorted[middle]) { high = middle } else { low = middle + 1 }
        }
        return low
    }
}
