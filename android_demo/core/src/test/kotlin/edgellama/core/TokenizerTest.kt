package edgellama.core

import org.junit.Test
import java.io.File
import java.util.Random
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class TokenizerTest {
    private val tokenizers = listOf("smollm2", "llama3").associateWith(Vectors::tokenizer)

    @Test
    fun encodesAsPython() {
        val cases = Vectors.json("encode.json").objects("cases")
        assertTrue(cases.size > 150)
        for (case in cases) {
            val tokenizer = tokenizers.getValue(case.string("tokenizer"))
            val text = case.string("text")
            val what = "${case.string("tokenizer")}: ${Json.write(text)}"
            assertContentEquals(case.ints("ids"), tokenizer.encode(text, addSpecialTokens = false), what)
            assertContentEquals(case.ints("ids_with_special"), tokenizer.encode(text), what)
        }
    }

    @Test
    fun cutsWordsAsPython() {
        for (case in Vectors.json("encode.json").objects("cases")) {
            val points = case.string("text").codePoints().toArray()
            var start = 0
            val words = tokenizers.getValue(case.string("tokenizer")).preTokenizer.ends(points).map { end ->
                String(points, start, end - start).also { start = end }
            }
            assertEquals(case.list("words"), words, Json.write(case.string("text")))
        }
    }

    @Test
    fun decodesAsPython() {
        for (case in Vectors.json("decode.json").objects("cases")) {
            val tokenizer = tokenizers.getValue(case.string("tokenizer"))
            val stream = tokenizer.stream()
            assertEquals(case.list("pieces"), case.ints("ids").map { stream.push(it) })
            assertEquals(case.string("flush"), stream.flush())
            val whole = case.list("pieces").joinToString("") + case.string("flush")
            assertEquals(whole, tokenizer.decode(case.ints("ids")))
        }
    }

    @Test
    fun knowsTheClassesOfCodePoints() {
        val json = Vectors.json("unicode.json")
        val sets = mapOf(
            "letter" to CodePoints.letters,
            "number" to CodePoints.numbers,
            "space" to CodePoints.spaces,
            "digit" to CodePoints.digits,
        )
        for ((name, set) in sets) {
            val expected = HashSet<Int>()
            for (range in json.list(name)) {
                val (first, last) = (range as List<*>).map { (it as Long).toInt() }
                expected.addAll(first..last)
            }
            for (point in 0..0x10ffff) assertEquals(point in expected, point in set, "$name ${point.toString(16)}")
        }
    }

    @Test
    fun mergesAsTheSlowWay() {
        val random = Random(3)
        repeat(300) {
            val table = HashMap<Pair<Int, Int>, Pair<Int, Int>>()
            val merges = Merges(40)
            for (rank in 0 until 40) {
                val pair = random.nextInt(12) to random.nextInt(12)
                if (table.putIfAbsent(pair, rank to random.nextInt(12)) == null) {
                    merges.add(pair.first, pair.second, rank, table.getValue(pair).second)
                }
            }
            val symbols = IntArray(random.nextInt(30)) { random.nextInt(12) }
            val slow = symbols.toMutableList()
            while (true) {
                val best = (0 until slow.size - 1).filter { (slow[it] to slow[it + 1]) in table }
                    .minByOrNull { table.getValue(slow[it] to slow[it + 1]).first } ?: break
                slow[best] = table.getValue(slow[best] to slow[best + 1]).second
                slow.removeAt(best + 1)
            }
            assertContentEquals(slow.toIntArray(), merges.apply(symbols))
        }
    }

    @Test
    fun aLongWordTakesNoTimeThatGrowsWithItsSquare() {
        val tokenizer = tokenizers.getValue("llama3")
        val ids = tokenizer.encode("a".repeat(300_000), addSpecialTokens = false)
        assertEquals("a".repeat(300_000), tokenizer.decode(ids))
    }

    @Test
    fun decodesDamagedUtf8AsTheJvm() {
        val random = Random(5)
        repeat(2000) {
            val bytes = ByteArray(random.nextInt(12))
            for (i in bytes.indices) bytes[i] = BYTES[random.nextInt(BYTES.size)].toByte()
            val decoder = Utf8Decoder()
            val found = bytes.joinToString("") { decoder.push(byteArrayOf(it)) } + decoder.flush()
            assertEquals(String(bytes, Charsets.UTF_8), found, bytes.joinToString())
        }
    }

    @Test
    fun surrogatesInUtf8AreBytesWithoutAMeaning() {
        // Where the JVM puts one U+FFFD, the standard and Python put one for each byte.
        val bytes = byteArrayOf(0xed.toByte(), 0xbf.toByte(), 0x8f.toByte(), 0x41)
        assertEquals("\ufffd\ufffd\ufffdA", Utf8Decoder().push(bytes))
    }

    @Test
    fun refusesOtherTokenizersWithTheReason() {
        val file = File(Vectors.directory, "llama3.tokenizer.json").readText()
        for ((from, to) in listOf(
            "\"normalizer\": null" to "\"normalizer\": {\"type\": \"NFC\"}",
            "\"type\": \"BPE\"" to "\"type\": \"Unigram\"",
            "\"Isolated\"" to "\"Removed\"",
            "\"lstrip\": false" to "\"lstrip\": true",
            "{1,3}" to "{1,2}",
            "\"type\": \"TemplateProcessing\"" to "\"type\": \"BertProcessing\"",
        )) {
            assertTrue(from in file, from)
            val error = assertFailsWith<EdgeLlamaException>(from) { Tokenizer.parse(file.replaceFirst(from, to)) }
            assertTrue(error.remedy.isNotBlank())
        }
        assertFailsWith<EdgeLlamaException> { Tokenizer.parse("{}") }
        assertFailsWith<EdgeLlamaException> { Tokenizer.parse(file.take(2000)) }
    }

    private companion object {
        val BYTES = intArrayOf(
            0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc2, 0xdf, 0xe0, 0xe1, 0xef, 0xf0, 0xf1, 0xf4,
            0xf5, 0xff,
        )
    }
}
