/// Byte pair encoding of one word: the pair of neighbours with the lowest rank is joined, the leftmost first among
/// equals, until no pair can be joined.
struct Merges: Sendable {
    private struct Merge {
        let rank: Int
        let joined: Int
    }

    private var table: [UInt64: Merge] = [:]

    init(capacity: Int) {
        table.reserveCapacity(capacity)
    }

    mutating func add(left: Int, right: Int, rank: Int, joined: Int) {
        let key: UInt64 = Merges.pair(left, right)
        if table[key] == nil { table[key] = Merge(rank: rank, joined: joined) }
    }

    /// The ids that `symbols`, one for each byte, become.
    func apply(_ symbols: [Int]) -> [Int] {
        let size: Int = symbols.count
        var ids: [Int] = symbols
        var next: [Int] = symbols.indices.map { $0 + 1 }
        var previous: [Int] = symbols.indices.map { $0 - 1 }
        var alive: [Bool] = [Bool](repeating: true, count: size)
        var queue: Heap = Heap()  // rank in the upper half, position in the lower

        for left in symbols.indices where next[left] < size {
            if let found: Merge = find(ids[left], ids[next[left]]) { queue.push(Merges.pair(found.rank, left)) }
        }
        while let best: UInt64 = queue.pop() {
            let left: Int = Int(best & 0xffff_ffff)
            if !alive[left] || next[left] >= size { continue }
            let right: Int = next[left]
            guard let found: Merge = find(ids[left], ids[right]), found.rank == Int(best >> 32) else {
                continue  // a neighbour was joined since
            }
            ids[left] = found.joined
            alive[right] = false
            next[left] = next[right]
            if next[right] < size { previous[next[right]] = left }
            for start in [left, previous[left]] where start >= 0 && next[start] < size {
                if let pair: Merge = find(ids[start], ids[next[start]]) { queue.push(Merges.pair(pair.rank, start)) }
            }
        }
        return symbols.indices.filter { alive[$0] }.map { ids[$0] }
    }

    private func find(_ left: Int, _ right: Int) -> Merge? {
        table[Merges.pair(left, right)]
    }

    private static func pair(_ upper: Int, _ lower: Int) -> UInt64 {
        UInt64(upper) << 32 | UInt64(lower)
    }
}

/// A binary heap, the smallest first.
private struct Heap {
    private var items: [UInt64] = []

    mutating func push(_ item: UInt64) {
        items.append(item)
        var at: Int = items.count - 1
        while at > 0 {
            let parent: Int = (at - 1) / 2
            if items[parent] <= items[at] { return }
            items.swapAt(parent, at)
            at = parent
        }
    }

    mutating func pop() -> UInt64? {
        guard let smallest: UInt64 = items.first else { return nil }
        let last: UInt64 = items.removeLast()
        if items.isEmpty { return smallest }
        items[0] = last
        var at: Int = 0
        while true {
            var child: Int = 2 * at + 1
            if child >= items.count { return smallest }
            if child + 1 < items.count && items[child + 1] < items[child] { child += 1 }
            if items[at] <= items[child] { return smallest }
            items.swapAt(at, child)
            at = child
        }
    }
}
