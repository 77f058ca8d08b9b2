package edgellama.core

import org.junit.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class JsonTest {
    @Test
    fun readsEveryKindOfValue() {
        val text = """ {"a": [1, -2.5e3, 0, 9007199254740993], "b": {"c": null, "d": [true, false]}, "e": ""} """
        val expected = mapOf(
            "a" to listOf(1L, -2500.0, 0L, 9007199254740993L),
            "b" to mapOf("c" to null, "d" to listOf(true, false)),
            "e" to "",
        )
        assertEquals<Any?>(expected, Json.parse(text))
        assertEquals("\"\\/\b\u000c\n\r\té🙂", Json.parse(""""\"\\\/\b\f\n\r\t\u00e9\ud83d\ude42""""))
        assertEquals(1e300, Json.parse("1e300"))
        assertEquals(1.2345678901234568E22, Json.parse("12345678901234567890123"))
    }

    @Test
    fun refusesWhatIsNotJson() {
        val texts = listOf(
            "", " ", "{", "[", "[1,]", "{\"a\":}", "{\"a\" 1}", "{a: 1}", "nul", "tru", "01", "1.", ".5", "+1", "-", "1e",
            "NaN", "Infinity", "\"", "\"\\x\"", "\"\\u12g4\"", "\"\n\"", "[1] 2", "'a'", "\"\\u12",
            "[".repeat(100_000),
        )
        for (text in texts) assertFailsWith<JsonException>(text.take(20)) { Json.parse(text) }
    }

    @Test
    fun writesWhatItReads() {
        val value = mapOf(
            "b" to listOf(1L, 0.1, true, null, "\"\\\n\u0001é🙂"),
            "a" to emptyMap<String, Any?>(),
            "c" to emptyList<Any?>(),
        )
        val text = Json.write(value)
        assertEquals<Any?>(value, Json.parse(text))
        assertTrue(text.indexOf("\"a\"") < text.indexOf("\"b\""))
        assertEquals("[\n  null,\n  null\n]\n", Json.write(listOf(Double.NaN, Double.POSITIVE_INFINITY)))
    }
}
