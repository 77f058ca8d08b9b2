/// A set of Unicode code points, unpacked from `UnicodeTables`.
struct CodePoints: Sendable {
    static let letters: CodePoints = CodePoints(UnicodeTables.letter)
    static let numbers: CodePoints = CodePoints(UnicodeTables.number)
    static let spaces: CodePoints = CodePoints(UnicodeTables.space)
    static let digits: CodePoints = CodePoints(UnicodeTables.digit)

    private let first: [UInt32]
    private let last: [UInt32]

    /// packed: pairs of numbers in base 36: the gap to the end of the range before, and the length less one.
    init(_ packed: String) {
        let numbers: [UInt32] = packed.split(separator: " ").map { UInt32($0, radix: 36)! }
        var first: [UInt32] = []
        var last: [UInt32] = []
        var end: UInt32 = 0
        for i in stride(from: 0, to: numbers.count, by: 2) {
            first.append(end + numbers[i])
            end += numbers[i] + numbers[i + 1]
            last.append(end)
        }
        self.first = first
        self.last = last
    }

    func contains(_ point: UInt32) -> Bool {
        // How many ranges begin at `point` or before it.
        var low: Int = 0
        var high: Int = first.count
        while low < high {
            let middle: Int = (low + high) / 2
            if first[middle] <= point { low = middle + 1 } else { high = middle }
        }
        return low > 0 && point <= last[low - 1]
    }
}
