package edgellama.core

/**
 * JSON as Kotlin values: Map<String, Any?> in the file's order, List<Any?>, String, Long, Double, Boolean, null.
 * A number without fraction and exponent that fits is a Long. Written with sorted keys.
 */
object Json {
    /** The value in [text]. Throws [JsonException] for anything that is not one JSON value. */
    fun parse(text: String): Any? = Parser(text).document()

    fun write(value: Any?): String = StringBuilder().also { write(value, "\n", it) }.append('\n').toString()

    private fun write(value: Any?, line: String, out: StringBuilder) {
        when (value) {
            null -> out.append("null")
            is Boolean, is Int, is Long -> out.append(value)
            is Double -> out.append(if (value.isNaN() || value.isInfinite()) "null" else value.toString())
            is Float -> write(value.toDouble(), line, out)
            is String -> quote(value, out)
            is Map<*, *> -> {
                val entries = value.entries.sortedBy { it.key as String }
                list(entries, '{', '}', line, out) { entry, inner ->
                    quote(entry.key as String, out)
                    out.append(": ")
                    write(entry.value, inner, out)
                }
            }
            is List<*> -> list(value, '[', ']', line, out) { item, inner -> write(item, inner, out) }
            else -> throw IllegalArgumentException("no JSON for ${value::class.java.name}")
        }
    }

    private fun <T> list(
        items: Collection<T>, open: Char, close: Char, line: String, out: StringBuilder, item: (T, String) -> Unit,
    ) {
        out.append(open)
        val inner = "$line  "
        items.forEachIndexed { i, value ->
            out.append(if (i == 0) inner else ",$inner")
            item(value, inner)
        }
        if (items.isNotEmpty()) out.append(line)
        out.append(close)
    }

    private fun quote(text: String, out: StringBuilder) {
        out.append('"')
        for (c in text) {
            when {
                c == '"' || c == '\\' -> out.append('\\').append(c)
                c == '\n' -> out.append("\\n")
                c < ' ' || c.isSurrogate() -> out.append("\\u").append(c.code.toString(16).padStart(4, '0'))
                else -> out.append(c)
            }
        }
        out.append('"')
    }
}

class JsonException(message: String) : Exception(message)

private const val MAX_DEPTH = 64

private class Parser(private val text: String) {
    private var at = 0

    fun document(): Any? {
        val value = value(0)
        space()
        if (at < text.length) fail("text after the value")
        return value
    }

    private fun value(depth: Int): Any? {
        if (depth > MAX_DEPTH) fail("nested more than $MAX_DEPTH deep")
        space()
        return when (peek()) {
            '{' -> objectValue(depth)
            '[' -> listValue(depth)
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> number()
        }
    }

    private fun objectValue(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        at++
        space()
        if (peek() == '}') {
            at++
            return found
        }
        while (true) {
            space()
            if (peek() != '"') fail("expected a name")
            val name = string()
            space()
            expect(':')
            found[name] = value(depth + 1)
            space()
            if (peek() == '}') break
            expect(',')
        }
        at++
        return found
    }

    private fun listValue(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        at++
        space()
        if (peek() == ']') {
            at++
            return found
        }
        while (true) {
            found.add(value(depth + 1))
            space()
            if (peek() == ']') break
            expect(',')
        }
        at++
        return found
    }

    private fun string(): String {
        expect('"')
        val start = at
        while (at < text.length && text[at] != '"' && text[at] != '\\' && text[at] >= ' ') at++
        if (peek() == '"') return text.substring(start, at++)
        val out = StringBuilder(text.substring(start, at))
        while (true) {
            when (val c = peek()) {
                '"' -> {
                    at++
                    return out.toString()
                }
                '\\' -> out.append(escape())
                else -> {
                    if (c < ' ') fail("a control character in a string")
                    out.append(c)
                    at++
                }
            }
        }
    }

    private fun escape(): Char {
        at++
        val c = peek()
        at++
        return when (c) {
            '"', '\\', '/' -> c
            'b' -> '\b'
            'f' -> '\u000c'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> {
                val digits = text.substring(at, minOf(at + 4, text.length))
                if (digits.length < 4 || digits.any { it !in '0'..'9' && it !in 'a'..'f' && it !in 'A'..'F' }) {
                    fail("expected four hexadecimal digits")
                }
                at += 4
                digits.toInt(16).toChar()
            }
            else -> fail("unknown escape")
        }
    }

    private fun number(): Any {
        val start = at
        if (peek() == '-') at++
        if (peek() == '0') at++ else digits()
        var whole = true
        if (at < text.length && text[at] == '.') {
            whole = false
            at++
            digits()
        }
        if (at < text.length && (text[at] == 'e' || text[at] == 'E')) {
            whole = false
            at++
            if (peek() == '+' || peek() == '-') at++
            digits()
        }
        val found = text.substring(start, at)
        return (if (whole) found.toLongOrNull() else null) ?: found.toDouble()
    }

    private fun digits() {
        if (peek() !in '0'..'9') fail("expected a value")
        while (at < text.length && text[at] in '0'..'9') at++
    }

    private fun word(word: String, value: Any?): Any? {
        if (!text.startsWith(word, at)) fail("expected a value")
        at += word.length
        return value
    }

    private fun space() {
        while (at < text.length && (text[at] == ' ' || text[at] == '\n' || text[at] == '\r' || text[at] == '\t')) at++
    }

    private fun peek(): Char = if (at < text.length) text[at] else fail("it ends too early")

    private fun expect(c: Char) {
        if (peek() != c) fail("expected '$c'")
        at++
    }

    private fun fail(problem: String): Nothing = throw JsonException("not JSON: $problem at character $at")
}
