package edgellama.core

import kotlin.math.exp

/** SplitMix64 (Steele, Lea, Flood 2014): the same sequence in every language. */
internal class Random(seed: Long) {
    private var state = seed

    /** 64 random bits. */
    fun next(): Long {
        state += -0x61c8864680b583ebL
        var z = state
        z = (z xor (z ushr 30)) * -0x40a7b892e31b1a47L
        z = (z xor (z ushr 27)) * -0x6b2fb644ecceee15L
        return z xor (z ushr 31)
    }

    /** A number in [0, 1): the upper 53 bits of [next]. */
    fun uniform(): Double = (next() ushr 11) * (1.0 / (1L shl 53))
}

/**
 * Draws the next token; the same seed gives the same tokens as in Python.
 *
 * temperature: 0 is greedy (the lowest id among equals). topP: the smallest set of tokens whose probability reaches
 * it is kept. seed: taken as 64 bits without a sign.
 */
class Sampler(private val temperature: Double = 0.0, private val topP: Double = 1.0, seed: Long = 0) {
    private val random = Random(seed)

    init {
        require(temperature in 0.0..100.0) { "temperature must lie in [0, 100], got $temperature" }
        require(topP > 0 && topP <= 1) { "top_p must lie in (0, 1], got $topP" }
    }

    /** The next token's id. Throws [ModelException] when no logit is a number. */
    fun sample(logits: FloatArray): Int {
        if (temperature == 0.0) return best(logits)
        val order = descending(logits)
        val top = logits[order[0]].toDouble()
        val cumulative = DoubleArray(order.size)
        var sum = 0.0
        for (i in order.indices) {
            sum += exp((logits[order[i]].toDouble() - top) / temperature)
            cumulative[i] = sum
        }
        val last = firstFrom(cumulative) { it >= topP * sum }
        val drawn = random.uniform() * cumulative[last]
        return order[minOf(firstFrom(cumulative) { it > drawn }, last)]
    }

    /** Ids by descending logit, the lower id first among equals. */
    private fun descending(logits: FloatArray): IntArray {
        best(logits)
        // One long a token: the logit's bits in the order of their values, turned around, and the id below them.
        val keys = LongArray(logits.size) { id ->
            val bits = (logits[id] + 0f).toRawBits()
            val ordered = if (bits < 0) bits.inv() else bits xor Int.MIN_VALUE
            ((ordered.inv().toLong() and 0xffffffffL) shl 31 shl 1 or id.toLong()) xor Long.MIN_VALUE
        }
        keys.sort()
        return IntArray(keys.size) { keys[it].toInt() }
    }

    private inline fun firstFrom(sorted: DoubleArray, found: (Double) -> Boolean): Int {
        var low = 0
        var high = sorted.size - 1
        while (low < high) {
            val middle = (low + high) / 2
            if (found(sorted[middle])) high = middle else low = middle + 1
        }
        return low
    }

    companion object {
        /** The most probable token, the lowest id among equals. Throws [ModelException] for NaN. */
        fun best(logits: FloatArray): Int {
            var best = 0
            for (id in logits.indices) {
                if (logits[id].isNaN()) {
                    throw ModelException(
                        "the model computed no number for token $id",
                        "Run the accuracy check; it says whether this device computes the model correctly.",
                    )
                }
                if (logits[id] > logits[best]) best = id
            }
            return best
        }
    }
}
