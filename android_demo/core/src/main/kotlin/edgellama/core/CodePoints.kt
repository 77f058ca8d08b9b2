package edgellama.core

/** A set of Unicode code points, unpacked from [UnicodeTables]. */
internal class CodePoints(packed: String) {
    private val first: IntArray
    private val last: IntArray

    init {
        // Pairs of numbers in base 36: the gap to the end of the range before, and the length less one.
        val numbers = packed.split(' ').map { it.toInt(36) }
        first = IntArray(numbers.size / 2)
        last = IntArray(numbers.size / 2)
        var end = 0
        for (i in first.indices) {
            first[i] = end + numbers[2 * i]
            last[i] = first[i] + numbers[2 * i + 1]
            end = last[i]
        }
    }

    operator fun contains(point: Int): Boolean {
        val found = first.binarySearch(point)
        val range = if (found >= 0) found else -found - 2
        return range >= 0 && point <= last[range]
    }

    companion object {
        val letters = CodePoints(UnicodeTables.LETTER)
        val numbers = CodePoints(UnicodeTables.NUMBER)
        val spaces = CodePoints(UnicodeTables.SPACE)
        val digits = CodePoints(UnicodeTables.DIGIT)
    }
}
