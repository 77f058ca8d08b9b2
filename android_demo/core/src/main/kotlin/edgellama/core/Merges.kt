package edgellama.core

import java.util.PriorityQueue

/**
 * Byte pair encoding of one word: the pair of neighbours with the lowest rank is joined, the leftmost first among
 * equals, until no pair can be joined.
 */
internal class Merges(count: Int) {
    // A pair of ids -> rank and new id, in an open hash table: boxed values would take some 30 MB for Llama 3.
    private val mask = Integer.highestOneBit(maxOf(count, 8) * 4) - 1
    private val keys = LongArray(mask + 1) { EMPTY }
    private val values = LongArray(mask + 1)

    fun add(left: Int, right: Int, rank: Int, joined: Int) {
        val slot = slot(pair(left, right))
        if (keys[slot] != EMPTY) return
        keys[slot] = pair(left, right)
        values[slot] = pair(rank, joined)
    }

    /** The ids that [symbols], one for each byte, become. */
    fun apply(symbols: IntArray): IntArray {
        val size = symbols.size
        val ids = symbols.copyOf()
        val next = IntArray(size) { it + 1 }
        val previous = IntArray(size) { it - 1 }
        val alive = BooleanArray(size) { true }
        val queue = PriorityQueue<Long>() // rank in the upper half, position in the lower

        fun offer(left: Int) {
            if (left < 0 || next[left] >= size) return
            val found = find(ids[left], ids[next[left]])
            if (found != NONE) queue.add(pair(upper(found), left))
        }
        for (i in 0 until size) offer(i)
        while (queue.isNotEmpty()) {
            val best = queue.remove()
            val left = lower(best)
            if (!alive[left] || next[left] >= size) continue
            val right = next[left]
            val found = find(ids[left], ids[right])
            if (found == NONE || upper(found) != upper(best)) continue // a neighbour was joined since
            ids[left] = lower(found)
            alive[right] = false
            next[left] = next[right]
            if (next[right] < size) previous[next[right]] = left
            offer(left)
            offer(previous[left])
        }
        return ids.filterIndexed { i, _ -> alive[i] }.toIntArray()
    }

    private fun find(left: Int, right: Int): Long {
        val slot = slot(pair(left, right))
        return if (keys[slot] == EMPTY) NONE else values[slot]
    }

    private fun slot(key: Long): Int {
        var slot = (key * -0x61c8864680b583ebL ushr 32).toInt() and mask
        while (keys[slot] != EMPTY && keys[slot] != key) slot = (slot + 1) and mask
        return slot
    }

    private companion object {
        const val EMPTY = -1L
        const val NONE = -1L

        fun pair(upper: Int, lower: Int) = (upper.toLong() shl 32) or lower.toLong()

        fun upper(pair: Long) = (pair ushr 32).toInt()

        fun lower(pair: Long) = pair.toInt()
    }
}
