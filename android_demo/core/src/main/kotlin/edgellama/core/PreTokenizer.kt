package edgellama.core

/**
 * Cuts text into the words that are merged by themselves.
 *
 * Written by hand, because regular expressions mean different things on a JVM, on Android and on Apple devices
 * (what \s and \p{L} match). The alternatives of each expression are tried in their order.
 */
internal enum class PreTokenizer(private val individualDigits: Boolean, private val next: (IntArray, Int, Int) -> Int) {
    /** 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ */
    GPT2(false, ::gpt2Word),

    /** Every digit is a word of its own, between them as GPT-2. */
    SMOLLM2(true, ::gpt2Word),

    /** The expression [LLAMA3_SPLIT]. */
    LLAMA3(false, ::llama3Word);

    /** Ends of the words in [points], in order; the first word starts at 0. */
    fun ends(points: IntArray): IntArray {
        val ends = ArrayList<Int>()
        var start = 0
        while (start < points.size) {
            val end = if (individualDigits) pieceEnd(points, start) else points.size
            while (start < end) {
                start = next(points, start, end)
                ends.add(start)
            }
        }
        return ends.toIntArray()
    }

    private fun pieceEnd(points: IntArray, start: Int): Int {
        if (points[start] in CodePoints.digits) return start + 1
        return until(points, start, points.size) { it in CodePoints.digits }
    }

    companion object {
        /** The pre-tokenizer that tokenizer.json describes. Throws [TokenizerException] for any other. */
        fun of(json: JsonObject?): PreTokenizer {
            val steps = when {
                json == null -> emptyList()
                json.string("type") == "Sequence" -> json.objects("pretokenizers")
                else -> listOf(json)
            }
            val kinds = steps.map(::kindOf)
            return when (kinds) {
                listOf("ByteLevel with words") -> GPT2
                listOf("Digits", "ByteLevel with words") -> SMOLLM2
                listOf("Llama 3", "ByteLevel") -> LLAMA3
                else -> throw TokenizerException(
                    "this app cannot split text as this model does (pre-tokenizer: $kinds)",
                    "Use a model with a byte-level tokenizer, such as SmolLM2 or Llama 3.",
                )
            }
        }

        private fun kindOf(step: JsonObject): String {
            val type = step.string("type")
            return when {
                type == "Digits" && step.boolean("individual_digits") -> "Digits"
                type == "ByteLevel" && !step.boolean("add_prefix_space") ->
                    if (step.boolean("use_regex")) "ByteLevel with words" else "ByteLevel"
                type == "Split" && step.string("behavior") == "Isolated" && !step.boolean("invert") &&
                    step.objectOf("pattern").stringOrNull("Regex") == LLAMA3_SPLIT -> "Llama 3"
                else -> type
            }
        }
    }
}

internal const val LLAMA3_SPLIT =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|" +
        " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

private const val SPACE = ' '.code
private val CONTRACTIONS = listOf("s", "t", "re", "ve", "m", "ll", "d")

private fun letter(point: Int) = point in CodePoints.letters

private fun number(point: Int) = point in CodePoints.numbers

private fun space(point: Int) = point in CodePoints.spaces

private fun other(point: Int) = !space(point) && !letter(point) && !number(point)

private fun newline(point: Int) = point == '\r'.code || point == '\n'.code

private inline fun until(points: IntArray, start: Int, end: Int, stop: (Int) -> Boolean): Int {
    var i = start
    while (i < end && !stop(points[i])) i++
    return i
}

/** The end of the word of points[start, end) that begins at [start]. */
private fun gpt2Word(points: IntArray, start: Int, end: Int): Int {
    contraction(points, start, end, ignoreCase = false)?.let { return it }
    val body = if (points[start] == SPACE && start + 1 < end) start + 1 else start
    val c = points[body]
    return when {
        letter(c) -> until(points, body, end) { !letter(it) }
        number(c) -> until(points, body, end) { !number(it) }
        other(c) -> until(points, body, end) { !other(it) }
        else -> spaces(points, start, end)
    }
}

private fun llama3Word(points: IntArray, start: Int, end: Int): Int {
    contraction(points, start, end, ignoreCase = true)?.let { return it }
    val c = points[start]
    val prefixed = !newline(c) && !letter(c) && !number(c) && start + 1 < end && letter(points[start + 1])
    if (letter(c) || prefixed) return until(points, start + 1, end) { !letter(it) }
    if (number(c)) return until(points, start, minOf(start + 3, end)) { !number(it) }
    val body = if (c == SPACE && start + 1 < end) start + 1 else start
    if (other(points[body])) {
        val symbols = until(points, body, end) { !other(it) }
        return until(points, symbols, end) { !newline(it) }
    }
    val run = until(points, start, end) { !space(it) }
    for (i in run - 1 downTo start) if (newline(points[i])) return i + 1
    return spaces(points, start, end)
}

/** White space: all of it at the end of the text, else all but the last, which belongs to the next word. */
private fun spaces(points: IntArray, start: Int, end: Int): Int {
    val run = until(points, start, end) { !space(it) }
    return if (run == end || run == start + 1) run else run - 1
}

private fun contraction(points: IntArray, start: Int, end: Int, ignoreCase: Boolean): Int? {
    if (points[start] != '\''.code) return null
    return CONTRACTIONS.firstOrNull { text ->
        start + text.length < end && text.indices.all { same(points[start + 1 + it], text[it], ignoreCase) }
    }?.let { start + 1 + it.length }
}

private fun same(point: Int, c: Char, ignoreCase: Boolean): Boolean =
    point == c.code || ignoreCase && (point == c.uppercaseChar().code || c == 's' && point == LONG_S)

private const val LONG_S = 0x17f // ſ, which is an s where case is ignored
